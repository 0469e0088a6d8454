"""A Hugging Face data set, with a column that says whose a row is."""

import numpy as np
from datasets import Dataset
from torch import nn

import fedsim
from fedsim.data.huggingface import from_hf

rng = np.random.default_rng(0)
x = rng.normal(size=(500, 4)).astype("float32")
rows = {"pixels": x, "label": (x.sum(1) > 0).astype(int), "writer": rng.integers(0, 6, 500)}
whole = Dataset.from_dict(rows)


def example(settings: list[str]) -> fedsim.RunResult:
    return fedsim.simulate(
        ["client.lr=0.1", *settings],
        model=lambda: nn.Linear(4, 2),
        data=from_hf(
            whole.select(range(400)), x="pixels", client="writer", test=whole.select(range(400, 500))
        ),
    )
