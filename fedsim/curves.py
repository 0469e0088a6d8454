"""Learning curves with matplotlib's object interface: no global state, no window, same look everywhere."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's palette (without its yellow, too pale on white): told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
}

Rows = Sequence[Mapping[str, Any]]


class Curves(Figure):
    """A figure that a notebook shows as it is, whatever its backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def draw(histories: Mapping[str, Sequence[Rows]]) -> Curves:
    """Accuracy and loss against rounds; a curve per label, the mean of its seeds with a band of one std.

    With several seeds only rounds that all of them measured are drawn: a mean over fewer seeds would jump.
    """
    with mpl.rc_context(STYLE):
        figure = Curves(figsize=(9.5, 3.8), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        looks = zip(cycle(COLOURS), (dash for dash in cycle(DASHES) for _ in COLOURS), strict=False)
        for (label, seeds), (colour, dash) in zip(histories.items(), looks, strict=False):
            for axes, metric in ((left, "accuracy"), (right, "loss")):
                _curve(axes, metric, seeds, label, colour, dash)
        _finish(left, "accuracy", "Test accuracy")
        _finish(right, "loss", "Test loss")
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        handles, labels = left.get_legend_handles_labels()
        if not handles:
            handles, labels = right.get_legend_handles_labels()
        if handles:
            columns = min(len(labels), max(1, 110 // (max(map(len, labels)) + 8)))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _curve(axes: Axes, metric: str, seeds: Sequence[Rows], label: str, colour: str, dash: str) -> None:
    series = [_measured(rows, metric) for rows in seeds]
    series = [values for values in series if values]
    if not series:
        return
    rounds = sorted(set.intersection(*(set(values) for values in series)))
    values = np.array([[one[at] for at in rounds] for one in series])  # (seeds, rounds)
    values[~np.isfinite(values)] = np.nan
    mean = values.mean(axis=0)
    marker = "o" if len(rounds) <= 20 else None
    axes.plot(rounds, mean, dash, color=colour, label=label, linewidth=1.8, marker=marker, markersize=3.5)
    if len(series) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(rounds, mean - std, mean + std, color=colour, alpha=0.22, linewidth=0)


def _measured(rows: Rows, metric: str) -> dict[int, float]:
    return {int(row["round"]): float(row[metric]) for row in rows if row.get(metric) is not None}


def _finish(axes: Axes, metric: str, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    values = np.concatenate(lines) if lines else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        axes.text(0.5, 0.5, f"no {metric} was measured", ha="center", transform=axes.transAxes)
    elif metric == "loss" and values.min() > 0 and values.max() > 50 * values.min():
        axes.set_yscale("log")  # one diverging method must not flatten the others
