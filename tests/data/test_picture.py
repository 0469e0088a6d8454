"""The picture of a partition is written for any number of clients."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.data import partition
from fedsim.data.picture import draw_partition


@pytest.mark.parametrize("clients", [1, 5, 200, 201])
def test_pictures_of_all_sizes(tmp_path, rng, clients):
    labels = rng.integers(4, size=300)
    shards = partition.Shards.of(partition.iid(labels, clients, rng))
    draw_partition(shards, labels, ["a", "b", "c", "\n"], tmp_path / "p.png")
    image = pytest.importorskip("PIL.Image").open(tmp_path / "p.png")
    assert min(image.size) > 400 and len(np.unique(np.asarray(image.convert("L")))) > 10
