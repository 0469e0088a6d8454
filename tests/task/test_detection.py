"""Mean average precision: the numbers of pycocotools, by hand, and the same however images are dealt out."""

from __future__ import annotations

import contextlib
import io
import math
import sys

import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.task.detection import MeanAveragePrecision, mean_average_precision
from fedsim.task.metrics import Counted

NAMES = ("map", "map_50", "map_75")


def boxes(n, k, generator):
    corner = 40 * torch.rand(n, k, 2, generator=generator)
    return torch.cat([corner, corner + 6 + 14 * torch.rand(n, k, 2, generator=generator)], dim=-1)


def problem(n=20, k=12, m=5):
    """Detections near some of the boxes to find, others anywhere; padded."""
    g = torch.Generator().manual_seed(0)
    true = {"boxes": boxes(n, m, g), "labels": torch.randint(-1, 3, (n, m), generator=g)}
    found = boxes(n, k, g)
    found[:, :m] = true["boxes"] + 2 * torch.randn(n, m, 4, generator=g)
    found = torch.cat([found[..., :2], torch.maximum(found[..., 2:], found[..., :2] + 1)], dim=-1)
    labels = torch.randint(-1, 3, (n, k), generator=g)
    labels[:, :m] = true["labels"]
    return {"boxes": found, "labels": labels, "scores": torch.rand(n, k, generator=g)}, true


def part(tree, rows):
    return {k: v[rows] for k, v in tree.items()}


def measured(found, true, *rows):
    metric = MeanAveragePrecision(decode=None)
    for at in rows or [slice(None)]:
        metric.update(part(found, at), part(true, at))
    return {k: v.item() for k, v in metric.compute().items()}


def by_pycocotools(found, true):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(tree):
        out = []
        for i, labels in enumerate(tree["labels"].tolist()):
            for j, label in enumerate(labels):
                x1, y1, x2, y2 = tree["boxes"][i, j].tolist()
                box, score = (
                    [x1, y1, x2 - x1, y2 - y1],
                    float(tree["scores"][i, j]) if "scores" in tree else 1.0,
                )
                row = {
                    "image_id": i,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
                out += [row | {"id": len(out) + 1, "score": score}] if label >= 0 else []
        return out

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(true["labels"]))],
            "annotations": rows(true),
            "categories": [{"id": i} for i in range(3)],
        }
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(rows(found)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return dict(zip(NAMES, run.stats[:3].tolist(), strict=True))


def test_the_numbers_are_those_of_pycocotools():
    found, true = problem()
    expected = by_pycocotools(found, true)
    assert 0.05 < expected["map"] < expected["map_50"] < 0.95
    assert measured(found, true) == pytest.approx(expected, abs=1e-12)


def test_batches_and_merged_shards_give_the_same():
    found, true = problem()
    whole = measured(found, true)
    assert measured(found, true, slice(0, 3), slice(3, 4), slice(4, 20)) == whole
    counted = Counted("map", MeanAveragePrecision(decode=None))
    first, second = (counted(part(found, rows), part(true, rows)) for rows in (slice(0, 7), slice(7, 20)))
    assert counted.value(first + second) == whole


def test_found_all_found_none_and_nothing_to_find():
    _, true = problem()
    perfect = {**true, "scores": torch.ones(true["labels"].shape)}
    assert measured(perfect, true) == dict.fromkeys(NAMES, pytest.approx(1.0))
    nothing = {**perfect, "labels": torch.full_like(true["labels"], -1)}
    assert measured(nothing, true) == dict.fromkeys(NAMES, 0.0)
    empty = {**true, "labels": torch.full_like(true["labels"], -1)}
    assert all(map(math.isnan, measured(perfect, empty).values()))


def test_a_half_covered_box_counts_at_half_the_overlap():
    true = {"boxes": torch.tensor([[[0.0, 0, 10, 10]]]), "labels": torch.tensor([[0]])}
    found = {
        "boxes": torch.tensor([[[0.0, 0, 10, 6]]]),
        "labels": torch.tensor([[0]]),
        "scores": torch.ones(1, 1),
    }
    assert measured(found, true) == pytest.approx(
        {"map": 0.3, "map_50": 1.0, "map_75": 0.0}
    )  # .5, .55 and .6


def test_a_detectors_output_is_decoded_first():
    metric = mean_average_precision(lambda output: {**output, "scores": output["scores"] / 2})["boxes"]
    found, true = problem()
    metric.update(found, true)
    assert metric.compute()["map"].item() == measured(found, true)["map"]


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedsim-lab\[detection\]'"):
        MeanAveragePrecision()
