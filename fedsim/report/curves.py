"""Learning curves with matplotlib's object interface: no global state, no window, same look everywhere."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedsim.report.placing import described, labelled, placed
from fedsim.report.runs import Group

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
    "svg.hashsalt": "fedsim",  # same curves, same file
}
LINE, CHARACTER = (
    0.22,
    0.083,
)  # inches: from line to line of a legend, and a character of its texts in the mean
MAX_DOTS = 500
MAX_CURVES = 28  # of one panel: so many looks differ
MAX_BANDS = 14  # bands of more curves hide each other
TITLES = {"accuracy": "Test accuracy", "loss": "Test loss"}
PSEUDO = {  # columns of methods that label samples themselves, shown where there are any
    "pseudo/kept_share": "Pseudo labels kept",
    "pseudo/accuracy": "Of those kept, right",
    "pseudo/global_share": "By the global model",
    "pseudo/class_share": "Of boxes kept, those that train the class",
    "pseudo/precision": "Of boxes kept, right at IoU .5",
    "pseudo/recall": "Of boxes there, found at IoU .5",
    "pseudo/most_frequent_share": "Of each client's most frequent class",
}

Rows = Sequence[Mapping[str, Any]]
Histories = Mapping[str, Sequence[Rows]]  # {label: [rows of one seed, rows of the next, ...]}


@dataclass(frozen=True)
class Axis:
    """What curves are drawn against: a column of the rows, or the running total of some."""

    columns: tuple[str, ...]
    words: str
    units: tuple[tuple[float, str], ...] = ()  # (size, name), the smallest first; none: as it is

    def at(self, row: Mapping[str, Any]) -> float | None:
        """The row's contribution; ``None`` if nothing was measured."""
        values = [row[column] for column in self.columns if row.get(column) is not None]
        return sum(map(float, values)) if values else None

    def unit(self, largest: float) -> tuple[float, str]:
        """The largest unit of which there are at least five, else the smallest."""
        fitting = [unit for unit in self.units if largest >= 5 * unit[0]]
        return (fitting or self.units[:1] or [(1.0, "")])[-1]


ROUNDS = Axis((), "round")
TRAFFIC = Axis(
    ("bytes_up", "bytes_down"),
    "sent and received by all clients",
    ((1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")),
)
_TIME = ((1.0, "s"), (60.0, "min"), (3600.0, "h"))
SECONDS = Axis(("seconds",), "computing time", _TIME)
SIMULATED = Axis(("sim_seconds",), "simulated time", _TIME)
ENERGY = Axis(("joules",), "energy of all clients", ((1.0, "J"), (1e3, "kJ"), (1e6, "MJ"), (1e9, "GJ")))


class Curves(Figure):
    """A figure that a notebook shows as it is, whatever its backend."""

    def _repr_png_(self) -> bytes:
        return image(self, "png")


def histories_of(groups: Sequence[Group]) -> dict[str, list[Rows]]:
    """Rows by label; of several seeds with their number: ``FedAvg (n=5)``."""
    return {
        group.label + (f" (n={len(group.runs)})" if len(group.runs) > 1 else ""): [
            run.rows for run in group.runs
        ]
        for group in groups
    }


def draw(histories: Histories, against: Axis = ROUNDS) -> Curves:
    """Accuracy and loss; a curve per label, the mean of its seeds with a band of one std.

    With several seeds only rounds that all of them measured are drawn: a mean over fewer seeds would jump. Against
    bytes, seconds or joules, a round stands at the mean over the seeds of what it took to get there.
    """
    with mpl.rc_context(STYLE):
        figure = _figure(9.5, 3.4)
        left, right = figure.subplots(1, 2)
        _fill(left, "accuracy", histories, against)
        _fill(right, "loss", histories, against)
        for axes, metric in ((left, "accuracy"), (right, "loss")):
            axes.set_title(TITLES[metric], loc="left", fontsize=11, fontweight="bold")
        described(figure, left if labelled(left)[0] else right)
    return figure


def panel(histories: Histories, metric: str, against: Axis = ROUNDS) -> Curves:
    """One metric only, without title and legend; :func:`looks` tells which curve is which."""
    with mpl.rc_context(STYLE):
        figure = _figure(5.2, 3.4)
        _fill(figure.subplots(), metric, histories, against)
        placed(figure)
    return figure


def one_panel() -> tuple[Curves, Axes]:
    """An empty figure and its axes, in the same style."""
    with mpl.rc_context(STYLE):
        figure = _figure(6.4, 4.0)
        return figure, figure.subplots()


def titled(figure: Figure) -> None:
    """Give a figure of one panel its legend."""
    with mpl.rc_context(STYLE):
        described(figure, figure.axes[0])


def spread(values: Mapping[str, Sequence[float]], words: str, percent: bool = True) -> Curves:
    """A row per label: a dot per client (up to ``MAX_DOTS``), a box from the 25th to the 75th percentile with the
    median in it, and a line from the 5th to the 95th. ``words`` name the axis.
    """
    with mpl.rc_context(STYLE):
        figure = _figure(6.2, 0.75 + 0.52 * len(values))
        axes = figure.subplots()
        boxes: list[tuple[float, ...]] = []
        colours: list[str] = []
        for row, ((label, points), (colour, _)) in enumerate(zip(values.items(), looks(), strict=False)):
            finite = np.array([value for value in points if np.isfinite(value)])
            axes.text(
                0, row - 0.3, label, transform=axes.get_yaxis_transform(), va="center", parse_math=False
            )
            if not len(finite):
                look: dict[str, Any] = {"ha": "center", "va": "center", "color": "#555555"}
                axes.text(0.5, row + 0.13, "nothing measured", transform=axes.get_yaxis_transform(), **look)
                continue
            boxes.append((row + 0.13, *np.percentile(finite, [5, 25, 50, 75, 95])))
            colours.append(colour)
            if len(finite) <= MAX_DOTS:
                height = row + 0.13 + 0.3 * (np.random.default_rng(0).random(len(finite)) - 0.5)
                axes.plot(finite, height, "o", color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
        _draw_boxes(axes, np.array(boxes).reshape(-1, 6), colours)
        axes.set(ylim=(len(values) - 0.4, -0.6), yticks=[], xlabel=words)
        axes.spines["left"].set_visible(False)
        if percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        placed(figure)
    return figure


def looks() -> Iterator[tuple[str, str]]:
    """Colour and dash of the first curve, the second, and so on: 28 that differ."""
    return zip(cycle(COLOURS), (dash for dash in cycle(DASHES) for _ in COLOURS), strict=False)


def image(figure: Figure, kind: str, **options: Any) -> bytes:
    """The figure as a file of that kind (png, svg, pdf), the same bytes each time."""
    buffer = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, metadata=dates.get(kind), **options)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Curves:
    figure = Curves(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    return figure


def _fill(axes: Axes, metric: str, histories: Histories, against: Axis) -> None:
    found = {
        label: [_measured(rows, metric, against) for rows in seeds]
        for label, seeds in islice(histories.items(), MAX_CURVES)
    }
    if len(histories) > MAX_CURVES:
        axes.set_title(f"the first {MAX_CURVES} of {len(histories)}", loc="right", fontsize=8)
    size, unit = against.unit(
        max((at for one in found.values() for p in one for at, _ in p.values()), default=0)
    )
    for (label, series), (colour, dash) in zip(found.items(), looks(), strict=False):
        own, few = [points for points in series if points], len(found) <= MAX_BANDS
        _curve(axes, own, size, few, label=label, color=colour, linestyle=dash)
    axes.set_xlabel(f"{against.words}, {unit}" if unit else against.words)
    _finish(axes, metric)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=not against.columns))


def _curve(
    axes: Axes, series: Sequence[Mapping[int, tuple[float, float]]], size: float, band: bool, **look: Any
) -> None:
    if not series:
        return
    rounds = sorted(set.intersection(*(set(points) for points in series)))
    points = np.array([[one[at] for at in rounds] for one in series]).reshape(len(series), len(rounds), 2)
    points[~np.isfinite(points)] = np.nan  # (seeds, rounds, 2)
    at, values = points[..., 0].mean(axis=0) / size, points[..., 1]
    mean = values.mean(axis=0)
    dots: dict[str, Any] = {"marker": "o" if len(rounds) <= 20 else None, "markersize": 3.5}
    axes.plot(at, mean, **look, **dots, linewidth=1.8)
    if band and len(series) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(at, mean - std, mean + std, color=look["color"], alpha=0.22, linewidth=0)


def _measured(rows: Rows, metric: str, against: Axis) -> dict[int, tuple[float, float]]:
    """``{round: (place on the axis, value)}`` of the rounds in which both were measured."""
    found, total, known = {}, 0.0, not against.columns
    for row in rows:
        step = against.at(row)
        total, known = total + (step or 0.0), known or step is not None
        if known and row.get(metric) is not None:
            found[int(row["round"])] = (total if against.columns else float(row["round"]), float(row[metric]))
    return found


def _finish(axes: Axes, metric: str) -> None:
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    values = np.concatenate(lines) if lines else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        axes.text(0.5, 0.5, f"no {metric} was measured", ha="center", transform=axes.transAxes)
    elif metric == "loss" and values.min() > 0 and values.max() > 50 * values.min():
        axes.set_yscale("log")  # one diverging method must not flatten the others
    if metric == "accuracy" or metric in PSEUDO:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _draw_boxes(axes: Axes, boxes: np.ndarray, colours: Sequence[str]) -> None:
    """``boxes`` (n, 6): place, then the 5th, 25th, 50th, 75th and 95th percentile."""
    at, low, first, median, third, high = boxes.T
    axes.hlines(at, low, high, color=colours, linewidth=1.2)
    for place, left, right, colour in zip(at, first, third, colours, strict=True):
        look: dict[str, Any] = {"facecolor": f"{colour}33", "edgecolor": colour}
        axes.add_patch(Rectangle((left, place - 0.17), right - left, 0.34, **look))
    axes.vlines(median, at - 0.17, at + 0.17, color=colours, linewidth=2.5)
