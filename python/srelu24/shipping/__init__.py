"""Which kernels a shape needs, and bundles of them for machines without a compiler. Needs no torch."""
