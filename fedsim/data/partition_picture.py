"""A picture of a partition: who holds how much of which class."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsim.data.longtail import GROUPS
from fedsim.data.shards import Shards

MAX_ROWS = 200  # clients that a heat map can still show


def draw_partition(
    shards: Shards,
    labels: np.ndarray,
    classes: Sequence[str],
    path: str | os.PathLike[str],
    *,
    groups: np.ndarray | None = None,
    local_test: Shards | None = None,
) -> None:
    """Draw a partition to an image file.

    Up to ``MAX_ROWS`` clients: a heat map of counts, classes x clients, every client's size above it and every class's
    beside it. More: the histogram of client sizes, and how many classes a client effectively sees, exp(entropy of its
    labels).

    Args:
        shards: the partition of m clients.
        labels: class labels of the whole data set ``(N,)``.
        classes: names of the classes ``(C,)``.
        path: file to write; its ending gives the format (png, pdf, svg).
        groups: many, medium or few of each class ``(C,)``, to colour it (see ``fedsim.data.longtail``).
        local_test: every client's own test samples, whose number is drawn too.
    """
    counts = shards.counts(labels, len(classes))
    tests = None if local_test is None else local_test.sizes
    figure = _heat_map(counts, classes, groups, tests) if len(shards) <= MAX_ROWS else _summary(counts)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def draw_sizes(shards: Shards, path: str | os.PathLike[str]) -> None:
    """Draw how many samples each of m clients holds: what a partition tells without its labels."""
    sizes = shards.sizes
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axes = figure.subplots()
    if len(sizes) <= MAX_ROWS:
        axes.bar(np.arange(len(sizes)), sizes, color="#4c72b0")
        axes.set(xlabel="client", ylabel="samples", xlim=(-0.7, len(sizes) - 0.3))
    else:
        axes.hist(sizes, bins=50, color="#4c72b0")
        axes.set(xlabel="samples per client", ylabel="clients")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_in_words(sizes), fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def _in_words(sizes: np.ndarray) -> str:
    low, high, median = (sizes.min(), sizes.max(), np.median(sizes)) if len(sizes) else (0, 0, 0)
    return f"{len(sizes):,} clients, {sizes.sum():,} samples: {low:,} to {high:,} per client, median {median:,.0f}"


def _heat_map(
    counts: np.ndarray, classes: Sequence[str], groups: np.ndarray | None, tests: np.ndarray | None
) -> Figure:
    clients, num_classes = counts.shape
    width = float(np.clip(3.7 + 0.22 * clients, 7.2, 15.2))
    height = float(np.clip(1.9 + 0.24 * num_classes, 3, 10))
    figure = Figure(figsize=(width, height), layout="constrained")
    ratios = (width - 2.2, 1.2, 0.1)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, max(height - 1.9, 1.2)), width_ratios=ratios)
    top, main, side, bar = (figure.add_subplot(grid[cell]) for cell in ((0, 0), (1, 0), (1, 1), (1, 2)))

    sizes = counts.sum(axis=1)
    bars = 0.8 if clients <= 60 else 1.0
    top.bar(np.arange(clients), sizes, width=bars, color="#4c72b0", label="training")
    if tests is not None:
        top.bar(np.arange(clients), tests, width=bars / 2, color="#dd8452", label="own test")
        legend = top.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        legend.set_in_layout(False)  # it stands in the empty corner
    top.set(ylabel="samples", xlim=(-0.5, clients - 0.5), xticks=[])
    top.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    top.spines[["top", "right"]].set_visible(False)
    top.set_title(_in_words(sizes), fontsize=10)

    shown = np.ma.masked_equal(counts.T, 0)
    scale = PowerNorm(0.5, vmin=0, vmax=max(int(counts.max()), 1))
    image = main.imshow(shown, aspect="auto", cmap="viridis_r", norm=scale, interpolation="nearest")
    _name_axes(main, clients, classes)
    if clients <= 12 and num_classes <= 20:
        _write_counts(main, counts)
    _class_sizes(side, counts.sum(axis=0), groups)
    figure.colorbar(image, cax=bar, label="samples (blank: none)")
    bar.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _class_sizes(axes: Axes, totals: np.ndarray, groups: np.ndarray | None) -> None:
    places = np.arange(len(totals))
    if groups is None:
        axes.barh(places, totals, color="#8c8c8c")
    else:
        for g, (name, colour) in enumerate(zip(GROUPS, ("#55a868", "#8172b3", "#c44e52"), strict=True)):
            axes.barh(places[groups == g], totals[groups == g], color=colour, label=name)
        axes.legend(fontsize=7, loc="lower right", frameon=False, handlelength=1)
    axes.set(xlabel="samples", ylim=(len(totals) - 0.5, -0.5), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _name_axes(axes: Axes, clients: int, classes: Sequence[str]) -> None:
    step = max(1, -(-len(classes) // 40))
    ticks = range(0, len(classes), step)
    names = [repr(classes[k])[1:-1] if classes[k].isspace() else classes[k] for k in ticks]
    axes.set_yticks(ticks, [name if len(name) <= 16 else name[:15] + "…" for name in names], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    axes.set(xlabel="client", xlim=(-0.5, clients - 0.5))
    if clients <= 60 and len(classes) <= 40:
        axes.set_xticks(np.arange(clients + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(classes) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)


def _write_counts(axes: Axes, counts: np.ndarray) -> None:
    dark = np.sqrt(counts / max(counts.max(), 1)) > 0.45
    for client, label in zip(*np.nonzero(counts), strict=True):
        colour = "white" if dark[client, label] else "black"
        axes.text(
            client, label, str(counts[client, label]), ha="center", va="center", fontsize=7, color=colour
        )


def _summary(counts: np.ndarray) -> Figure:
    sizes = counts.sum(axis=1)
    held = counts[sizes > 0]
    share = held / held.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{len(sizes):,} clients, {sizes.sum():,} samples, {int((sizes == 0).sum()):,} clients without any; "
        f"average label entropy {entropy.mean() if len(entropy) else 0:.2f} nats "
        f"(even: {np.log(max(counts.shape[1], 1)):.2f})",
        fontsize=10,
    )
    spread = int(sizes.max() - sizes.min())
    bins = np.arange(sizes.min(), sizes.max() + 2) - 0.5 if spread < 50 else 50
    left.hist(sizes, bins=bins, color="#4c72b0")
    left.set(xlabel="samples per client", ylabel="clients")
    left.axvline(np.median(sizes), color="black", linestyle="--", label=f"median {np.median(sizes):,.0f}")
    right.hist(np.exp(entropy), bins=40, range=(1, max(counts.shape[1], 2)), color="#55a868")
    right.set(xlabel="effective classes per client, exp(label entropy)", ylabel="clients")
    right.axvline(
        np.exp(entropy).mean(), color="black", linestyle="--", label=f"mean {np.exp(entropy).mean():.1f}"
    )
    for axes in (left, right):
        axes.legend(framealpha=0.9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure
