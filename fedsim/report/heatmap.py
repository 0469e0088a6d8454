"""A table of numbers as a picture: rows against columns, each cell coloured and written out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsim.report.curves import STYLE

COLOURS = "cividis"  # told apart with any kind of colour vision
DARK = 0.55  # share of the range up to which white is read on it


def draw_heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    low: float = 0.0,
    high: float = 100.0,
    apart: Sequence[int] = (),
    less: Sequence[int] = (),
) -> None:
    """Write ``values`` (r, c), NaN where there is none, to an image file (png, pdf, svg).

    Args:
        values: (r, c), in the unit in which they are written, with one decimal.
        rows: names (r,).
        columns: names (c,).
        path: of the file.
        title: above it.
        low: end of the colours, in the same unit.
        high: the other end.
        apart: columns before which a line is drawn, as before a summary.
        less: columns of which less is better, coloured the other way round.
    """
    with mpl.rc_context(STYLE):
        size = (1.9 + 0.72 * len(columns), 1.3 + 0.3 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        shades = np.array(values, dtype=float)
        shades[:, list(less)] = low + high - shades[:, list(less)]
        shown = np.ma.masked_invalid(shades)
        axes.imshow(shown, cmap=COLOURS, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        for i, j in np.argwhere(np.isfinite(values)):
            colour = "white" if shades[i, j] < low + DARK * (high - low) else "black"
            axes.text(j, i, f"{values[i, j]:.1f}", ha="center", va="center", fontsize=8, color=colour)
        for j in apart:
            axes.axvline(j - 0.5, color="white", linewidth=3)
        axes.set_title(title, fontsize=10)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=110)
