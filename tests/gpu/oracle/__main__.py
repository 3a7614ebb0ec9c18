"""Build the libraries, one after the other, and print where they are."""

from tests.gpu.oracle import MMA_SYNC, WGMMA

for library in (MMA_SYNC, WGMMA):
    print(library.build())
