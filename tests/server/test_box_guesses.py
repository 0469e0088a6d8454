"""How right pseudo boxes are: matched by hand, moved with their images, and in a whole run that finds every box."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedsim
from fedsim.data.views import Affine, Mosaic, Noise, Traced, Unchanged
from fedsim.exchange.payload import BoxGuesses
from fedsim.models.boxes import right_ones
from fedsim.server.examiner import boxes_found

SIDE = 24


def by_hand(boxes: Any, labels: Any, scores: Any, there: Any, classes: Any) -> int:
    """Of one image, in plain Python."""
    taken, right = set[int](), 0
    for i in sorted((i for i in range(len(labels)) if labels[i] >= 0), key=lambda i: (-scores[i], i)):
        best, which = 0.5, -1
        for j in range(len(classes)):
            ax, ay = np.minimum(boxes[i][2:], there[j][2:]) - np.maximum(boxes[i][:2], there[j][:2])
            inner = max(ax, 0) * max(ay, 0)
            whole = sum(float(np.prod(b[2:] - b[:2])) for b in (boxes[i], there[j])) - inner
            if classes[j] == labels[i] and j not in taken and inner / whole >= best:
                best, which = inner / whole, j
        if which >= 0:
            taken.add(which)
            right += 1
    return right


def test_boxes_are_matched_as_by_hand() -> None:
    rng = np.random.default_rng(0)
    corner, off = rng.uniform(0, 10, (40, 6, 2)), rng.normal(0, 1.2, (40, 5, 4))
    there = np.concatenate([corner, corner + rng.uniform(3, 8, (40, 6, 2))], 2)
    boxes = there[:, [0, 1, 2, 2, 3]] + off
    labels, classes = rng.integers(-1, 2, (40, 5)), rng.integers(-1, 2, (40, 6))
    scores = rng.uniform(0.1, 1, (40, 5))
    found = right_ones(*map(torch.tensor, (boxes, labels, scores, there, classes)))
    expected = [by_hand(*(t[i] for t in (boxes, labels, scores, there, classes))) for i in range(40)]
    assert found.tolist() == expected and 20 < sum(expected) < 150
    none = torch.zeros(40, 0, 4), torch.zeros(40, 0, dtype=torch.long)
    assert not right_ones(*map(torch.tensor, (boxes, labels, scores)), *none).any()


def test_true_boxes_are_moved_as_the_images_were() -> None:
    """Mirrored, and then away by 30 pixels to the right: one box is where it was found, the other is out of sight."""
    mirror = torch.tensor([[-1.0, 0, 100], [0, 1, 0]], dtype=torch.float64)
    away = torch.tensor([[1.0, 0, -30], [0, 1, 0]], dtype=torch.float64)
    truth = {
        "boxes": torch.tensor([[[0.0] * 4] * 2, [[60.0, 10, 80, 30], [0, 10, 20, 30]]]),
        "labels": torch.tensor([[-1, -1], [2, 2]]),
    }
    found = torch.tensor([[[50.0, 10, 70, 30], [0, 0, 9, 9]]])

    def graded(label: int) -> dict[str, int]:
        labels, scores = torch.tensor([[label, -1]]), torch.tensor([[0.9, 0.0]])
        moves = torch.stack([mirror, away])[None]
        return boxes_found(
            BoxGuesses(torch.tensor([1]), found, labels, scores, moves, (50, 100), 0.25), truth
        )

    assert graded(2) == {"right": 1, "there": 1} and graded(1) == {"right": 0, "there": 1}


def test_which_views_can_be_followed() -> None:
    x, key = torch.rand(3, 3, 8, 8), torch.Generator().manual_seed(0)
    for view, moves in ((Affine(), 1), (Noise(), 0), (Unchanged(), 0), (Mosaic(), None)):
        traced = Traced(view)
        shown = traced(x, key.manual_seed(1))
        assert torch.equal(shown, view(x, key.manual_seed(1)))
        assert traced.moves is None if moves is None else len(traced.moves or ()) == moves


class Bright(nn.Module):
    """The images themselves; its one weight is of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * sum(p.sum() for p in self.parameters())


def brightest(output: Tensor, wrong: int = 0, **options: Any) -> dict[str, Tensor]:
    """The box around what is bright, one in an image, which is of class 0; and as many of class 1, which are wrong."""
    bright = output[:, 0] > 0.5
    ends = []
    for lit in (bright.any(1), bright.any(2)):  # columns, rows
        at = torch.arange(SIDE, dtype=output.dtype)
        ends += [torch.where(lit, at, SIDE).amin(1), torch.where(lit, at + 1, 0).amax(1)]
    box = torch.stack([ends[0], ends[2], ends[1], ends[3]], dim=1)[:, None].repeat(1, 1 + wrong, 1)
    labels = torch.tensor([0, 1])[: 1 + wrong].repeat(len(output), 1)
    return {"boxes": box, "labels": labels, "scores": labels * 0.0 + 0.9, "objectness": labels * 0.0 + 0.9}


def nothing_lost(output: Tensor, y: Any) -> dict[str, Tensor]:
    return dict.fromkeys(("class", "objectness", "box"), output.flatten(1).sum(1) * 0)


def pictures(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A white box, somewhere left, on black."""
    rng = np.random.default_rng(seed)
    x, boxes = torch.zeros(count, 3, SIDE, SIDE), torch.zeros(count, 1, 4)
    for i in range(count):
        left, top = rng.integers(0, 6), rng.integers(0, SIDE - 10)
        wide, high = rng.integers(5, 10, 2)
        x[i, :, top : top + high, left : left + wide] = 1
        boxes[i, 0] = torch.tensor([left, top, left + wide, top + high])
    return x, {"boxes": boxes, "labels": torch.zeros(count, 1, dtype=torch.long)}


@pytest.mark.parametrize("weak", ["affine", "null"])
@pytest.mark.parametrize(("wrong", "precision"), [(0, 1.0), (1, 0.5)])
def test_a_detector_that_finds_every_box_is_right(weak: str, wrong: int, precision: float) -> None:
    """Whatever the view does, the true boxes go along: otherwise boxes left would be sought right."""
    here = __name__
    found = fedsim.simulate(
        [
            "strategy=fedsto",
            f"strategy.decode._target_={here}.brightest",
            f"+strategy.decode.wrong={wrong}",
            f"strategy.losses.path={here}.nothing_lost",
            "strategy.selective_rounds=1",
            "strategy.warmup_rounds=0",
            "strategy.strong=[]",
            *([] if weak == "affine" else ["strategy.weak=null"]),
            "view@views.weak=affine",
            "views.weak.degrees=0",
            "data.labelled={at: server, count: 4, per_class: false}",
            "rounds=2",
            "clients_per_round=2",
            "client.epochs=2",
            "client.batch_size=3",
            "engine=serial",
            "tracker=quiet",
        ],
        model=Bright(),
        clients=[pictures(8, 0), pictures(5, 1)],
        loss=lambda output, y: output.sum() * 0,
        metrics={},
    )
    for row in found.rows:
        assert row["pseudo/precision"] == pytest.approx(precision, abs=0.08)
        assert row["pseudo/recall"] == pytest.approx(1, abs=0.08)
    counts = found.per_client.query("metric == 'pseudo/there'").value
    assert 0 < counts.max() <= 16
