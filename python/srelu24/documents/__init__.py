"""Pages, tables and plots of this project's documents, made from result files and records."""
