"""Where the panels and the legend of a figure stand, by the lengths of their texts: nothing is drawn to be measured."""

from __future__ import annotations

import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_UNNAMED = re.compile(r"_(child|container)\d+$|_nolegend_$")  # what matplotlib calls what nobody named
LINE, CHARACTER = (
    0.22,
    0.083,
)  # inches: from line to line of a legend, and a character of its texts in the mean


def described(figure: Figure, axes: Axes) -> None:
    """Put the legend of ``axes`` below the panels, which become no smaller for it, and everything in its place. A
    figure that is narrower than the longest label becomes as wide.

    It is drawn by hand: matplotlib's own measures each of its texts some twenty times over.
    """
    handles, labels = labelled(axes)
    width, height = (float(inches) for inches in figure.get_size_inches())
    entry = 0.75 + CHARACTER * max(map(len, labels), default=0)
    width = max(width, entry + 0.2)
    columns = max(1, min(len(labels), int((width - 0.2) / entry)))
    rows = -(-len(labels) // columns)
    below = LINE * rows + 0.1 if rows else 0.0
    figure.set_size_inches(width, height + below)
    column = min((width - 0.2) / columns, entry)
    for at, (handle, label) in enumerate(zip(handles, labels, strict=True)):
        drawn: Any = handle if isinstance(handle, Line2D) else handle[0]  # of bars their line
        x = (width - columns * column) / 2 + column * (at // rows)
        y = (below - LINE * (at % rows + 0.5)) / (height + below)
        look = {"color": drawn.get_color(), "linestyle": drawn.get_linestyle(), "marker": drawn.get_marker()}
        ends = [x / width, (x + 0.15) / width, (x + 0.3) / width]
        figure.add_artist(Line2D(ends, [y] * 3, linewidth=1.8, markersize=3.5, markevery=[1], **look))
        figure.text((x + 0.4) / width, y, label, va="center_baseline", parse_math=False)
    placed(figure, below)


def labelled(axes: Axes) -> tuple[list[Any], list[str]]:
    """Curves and error bars that were given a label, and these; matplotlib's own leaves out those with an underscore
    before them."""
    things: list[Any] = [*axes.get_lines(), *axes.containers]
    found = [(thing, str(thing.get_label())) for thing in things]
    named = [pair for pair in found if pair[1] and not _UNNAMED.match(pair[1])]
    return [thing for thing, _ in named], [label for _, label in named]


def placed(figure: Figure, below: float = 0.0) -> None:
    """Put the panels, which stand side by side, in their places: with room for the texts at their axes, and ``below``
    inches more under them. It takes a hundredth of what a layout by measured texts does."""
    width, height = figure.get_size_inches()
    rooms = [_room(axes) for axes in figure.axes]
    inner = (width - sum(rooms) - 0.15 * len(rooms)) / max(len(rooms), 1)
    x = 0.0
    for axes, room in zip(figure.axes, rooms, strict=True):
        top = 0.35 if axes.get_title("left") or axes.get_title("right") else 0.15
        bottom = below + 0.55
        axes.set_position(
            ((x + room) / width, bottom / height, inner / width, (height - top - bottom) / height)
        )
        x += room + inner + 0.15


def _room(axes: Axes) -> float:
    """Inches that the texts left of an axes take."""
    axis = axes.yaxis
    shown = axis.get_tick_params().get("labelleft", True)
    texts = axis.get_major_formatter().format_ticks(list(axis.get_majorticklocs())) if shown else []
    longest = max((len(text) if "$" not in text else 4 for text in texts), default=0)
    return 0.2 + CHARACTER * longest + (0.22 if axes.get_ylabel() else 0.0)
