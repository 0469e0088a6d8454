"""Arrays larger than memory: rows are read from the file when a batch needs them."""

import tempfile
from pathlib import Path

import numpy as np
from torch import nn

import fedsim

folder = Path(tempfile.mkdtemp())
images = np.random.default_rng(0).normal(size=(600, 8, 8)).astype("float32")
labels = (images[:, :4].mean((1, 2)) > images[:, 4:].mean((1, 2))).astype("int64")
np.save(folder / "x.npy", images)


def example(settings: list[str]) -> fedsim.RunResult:
    x = np.load(folder / "x.npy", mmap_mode="r")
    return fedsim.simulate(
        ["num_clients=5", "client.lr=0.1", *settings],
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
        data=(x, labels),
        test=(images[:200], labels[:200]),
    )
