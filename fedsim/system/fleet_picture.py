"""A picture of the fleet: how fast devices and links are, and how many clients are there over two days."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from fedsim.report.curves import COLOURS, STYLE, Curves
from fedsim.system.availability import DAY, HOUR
from fedsim.system.clock import Clock

SHOWN = 20_000  # clients at most that presence is counted over


def draw_fleet(clock: Clock, path: Path) -> None:
    """Write histograms of speed and links and the share of clients present to ``path`` (.png, .pdf, .svg)."""
    fleet = clock.fleet
    with mpl.rc_context(STYLE):
        figure = Curves(figsize=(10.5, 3.2), dpi=110, layout="constrained")
        speed, link, there = figure.subplots(1, 3)
        _histogram(speed, [("", fleet.speed)])
        what = {"samples": "samples/s", "flops": "flop/s"}[clock.system.work]
        speed.set(title="Devices", xlabel=what, ylabel="clients")
        _histogram(link, [("down", fleet.down), ("up", fleet.up)])
        link.set(title="Links", xlabel="kB/s")
        link.legend(frameon=False)
        ids = np.arange(min(len(fleet), SHOWN))
        times = np.arange(0, 2 * DAY, HOUR / 2)
        share = [np.mean(clock.presence.until(ids, t) > t) for t in times]
        there.plot(times / HOUR, share, color=COLOURS[0])
        there.set(title="Clients there", xlabel="virtual time, h", ylim=(0, None), xticks=range(0, 49, 12))
        there.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=None))
        figure.savefig(path, dpi=150)


def _histogram(axes: Axes, series: list[tuple[str, np.ndarray]]) -> None:
    """Histograms over logarithmic bins that all series share."""
    low, high = (f(np.concatenate([v for _, v in series])) for f in (np.min, np.max))
    edges = np.geomspace(low / 1.1, high * 1.1, 25).tolist()
    for (label, values), colour in zip(series, COLOURS, strict=False):
        axes.hist(values, edges, color=colour, alpha=0.7, label=label)
    axes.set_xscale("log")
