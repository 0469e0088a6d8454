"""The picture of a partition is written for any number of clients."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.data import partition
from fedsim.data.partition_picture import draw_partition


@pytest.mark.parametrize("clients", [1, 5, 200, 201])
def test_pictures_of_all_sizes(tmp_path, rng, clients):
    labels = rng.integers(4, size=300)
    shards = partition.Shards.of(partition.iid(labels, clients, rng))
    draw_partition(shards, labels, ["a", "b", "c", "\n"], tmp_path / "p.png")
    image = pytest.importorskip("PIL.Image").open(tmp_path / "p.png")
    assert min(image.size) > 400 and len(np.unique(np.asarray(image.convert("L")))) > 10


def test_groups_and_local_tests_are_drawn(tmp_path, rng):
    labels = np.repeat([0, 1, 2], [200, 60, 9])
    shards = partition.Shards.of(partition.iid(labels, 6, rng))
    for name, more in (("plain", {}), ("full", {"groups": np.array([0, 1, 2]), "local_test": shards})):
        draw_partition(shards, labels, ["a", "b", "c"], tmp_path / f"{name}.png", **more)
    pixels = {}
    for name in ("plain", "full"):
        image = pytest.importorskip("PIL.Image").open(tmp_path / f"{name}.png").convert("RGB")
        pixels[name] = {c for _, c in image.getcolors(1 << 24)}
    colours = {tuple(bytes.fromhex(c)) for c in ("55a868", "8172b3", "c44e52", "dd8452")}
    assert colours <= pixels["full"] and not colours & pixels["plain"]
