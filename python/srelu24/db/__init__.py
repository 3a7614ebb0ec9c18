"""What is known to be fast: records, where they lie, and what they answer. Needs no torch."""
