"""Shapes in weathers: the same bytes for a seed, boxes that fit, domains to split by, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fedsim.data.bydomain import domains
from fedsim.data.sources import weather_shapes
from fedsim.data.weather import pictures
from fedsim.errors import DataError
from fedsim.rng import hash_tensors, numpy_rng

SMALL = {"train": {"cloudy": 6, "overcast": 5, "rainy": 4, "snowy": 3}, "test": 2}


def made(**options):
    node = OmegaConf.load(Path(__file__).resolve().parents[2] / "conf/data/weather_shapes.yaml")
    return weather_shapes(**{**instantiate(node, _partial_=True).keywords, **SMALL, **options})


def bits(data):
    return hash_tensors([data.train.x, *data.train.y.values(), data.test.x])


def test_pictures_follow_from_the_seed():
    assert bits(made()) == bits(made()) != bits(made(seed=1))
    assert hash_tensors([made().train.x[:6]]) == hash_tensors([made(domains=["cloudy"]).train.x])


def test_shapes_domains_and_targets():
    data = made()
    assert data.train.x.shape == (18, 3, 64, 64) and data.train.x.dtype == torch.uint8
    assert data.train.y["boxes"].shape == (18, 4, 4) and data.train.y["labels"].dtype == torch.int64
    assert data.domains == ("cloudy", "overcast", "rainy", "snowy") and data.num_classes == 3
    assert np.bincount(data.domain("train")).tolist() == [6, 5, 4, 3]
    assert np.bincount(data.domain("test")).tolist() == [2, 2, 2, 2]
    parts = domains(np.zeros(18, np.int64), 4, np.random.default_rng(0), ids=data.ids)
    assert [len(p) for p in parts] == [6, 5, 4, 3]
    assert made(side=32, shapes=[6, 10]).train.x.shape == (18, 3, 32, 32)


def test_boxes_lie_inside_apart_and_in_the_sizes_asked_for():
    found = pictures("cloudy", 400, numpy_rng(0, "test"))
    there = found.labels >= 0
    assert there[:, 0].all() and set(there.sum(1)) == {1, 2, 3, 4}
    assert (there[:, :-1] >= there[:, 1:]).all() and not found.boxes[~there].any()
    own = found.boxes[there]
    assert own.min() >= 0 and own.max() <= 64
    sides = own[:, 2:] - own[:, :2]
    assert sides.min() >= 9 - 1e-4 and sides.max() <= 22 + 1e-4
    for boxes, here in zip(found.boxes, there, strict=True):
        for i in range(here.sum()):
            for j in range(i):
                low, high = np.maximum(boxes[i], boxes[j])[:2], np.minimum(boxes[i], boxes[j])[2:]
                assert (high - low).min() <= 0
    assert np.bincount(found.labels[there]).min() > 0.25 * there.sum()


def test_a_shape_fills_its_box_as_its_label_says():
    found = pictures("cloudy", 60, numpy_rng(0, "test"), noise=0.0)
    shares: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for x, boxes, labels in zip(found.x.astype(float), found.boxes, found.labels, strict=True):
        own = abs(x - np.median(x, axis=(1, 2), keepdims=True)).sum(0) > 1
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            if label >= 0:
                inside = own[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1]
                shares[int(label)].append(inside.sum() / ((x2 - x1) * (y2 - y1)))
        assert own.sum() <= 1.1 * sum(
            (b[2] - b[0]) * (b[3] - b[1]) for b in boxes
        )  # and nothing lies outside
    assert [np.mean(shares[k]) for k in range(3)] == pytest.approx([np.pi / 4, 1, 1 / 2], abs=0.03)


def test_weathers_differ_as_described():
    few = {"count": 60, "noise": 0.1}
    data = {
        name: pictures(name, rng=numpy_rng(0, "test"), contrast=0.4, **few).x / 255 for name in SMALL["train"]
    }
    clear = pictures("cloudy", rng=numpy_rng(0, "test"), **few).x / 255
    assert (data["overcast"].max(1) == data["overcast"].min(1)).all()  # gray
    assert data["cloudy"].std() == pytest.approx(0.4 * clear.std(), rel=0.02)
    assert data["snowy"].mean() > 0.6 > clear.mean() and (data["snowy"] == 1).mean() > 0.02
    assert abs(np.diff(data["rainy"], axis=3)).mean() < abs(np.diff(data["snowy"], axis=3)).mean()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"domains": ["sunny"]}, "no weather 'sunny'; give cloudy"),
        ({"train": {"cloudy": 0}}, "no weather has a training picture"),
        ({"train": {"cloudy": -1}}, "Type data.train.cloudy=300"),
        ({"train": {"cloudy": 3}, "domains": ["rainy"]}, "Type data.train.rainy=300"),
        ({"shapes": [9, 70]}, r"data.shapes=\[9, 70\]"),
        ({"contrast": {"rainy": 0.0}}, "data.contrast.rainy=0.0"),
        ({"test": -1}, "data.test=-1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, words):
    with pytest.raises(DataError, match=words):
        made(**options)
