"""Figures drawn with matplotlib, which is not there without the ``bench`` extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from srelu24_gen.errors import Srelu24Error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def figure(path: Path | str, width: float, height: float) -> Iterator[Figure]:
    """A figure of ``width`` x ``height`` inches to draw on; afterwards it is in ``path``, whose suffix says which kind.

    The same drawing gives the same SVG.

    Raises:
        Srelu24Error: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Srelu24Error("plots need matplotlib; install it with pip install 'srelu24[bench]'") from error
    path = Path(path)
    # A fixed salt and no date are what makes two SVGs alike.
    with matplotlib.rc_context({"svg.hashsalt": "srelu24", "font.size": 9}):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise Srelu24Error(f"{path} cannot be written ({error.strerror}); choose another path") from error
