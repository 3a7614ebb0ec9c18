"""Build the library and print where it is."""

from tests.gpu.oracle import build

print(build())
