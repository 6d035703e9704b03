"""matplotlib figures without pyplot, so that no window system and no global style is touched; and saving them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.errors import DiskError, ErrataError, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches, and its panels side by side."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ErrataError("plots need matplotlib, which is not installed; pip install matplotlib") from None
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def finish(axes: Axes, title: str) -> None:
    """Title, grid and legend of a panel."""
    axes.set_title(title, fontsize=10)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=7)


def save(made: Figure, paths: Sequence[str | Path]) -> None:
    """Each path by its ending.  An SVG is the same file for the same numbers: text stays text, and no date is written."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "errata"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from.*font")  # a script the font lacks is drawn as boxes
        for path in paths:
            try:
                made.savefig(path, dpi=200, metadata={"Date": None} if str(path).endswith(".svg") else None)
            except ValueError as error:  # an ending matplotlib cannot write
                raise InputError(f"{path}: {error}") from None
            except OSError as error:
                raise DiskError(f"{path}: cannot be written ({error.strerror}); check the folder and the space left") from None
