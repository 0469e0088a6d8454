"""Samples that a method made, as one picture."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

COLUMNS, ROWS = 10, 4


def draw_samples(x: Tensor, y: Tensor, path: Path) -> None:
    """The first 40 of images ``x`` (n, ch, H, W) in [0, 1], each under its label ``y`` (n,)."""
    count = min(len(x), COLUMNS * ROWS)
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(COLUMNS * 0.8, rows * 1.0), layout="constrained")
    for i, axes in enumerate(figure.subplots(rows, COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if i < count:
            image = x[i].detach().to("cpu", torch.float32).clamp(0, 1).permute(1, 2, 0).numpy()
            coloured = image.shape[2] == 3
            axes.imshow(
                image if coloured else image[:, :, 0], cmap=None if coloured else "gray", vmin=0, vmax=1
            )
            axes.set_title(str(int(y[i])), fontsize=7)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100)
