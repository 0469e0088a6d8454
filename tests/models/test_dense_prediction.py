"""U-Net and detector: shapes, parts by name, loss and boxes by hand, suppression against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

from fedsim import models
from fedsim.errors import ConfigError
from fedsim.models import detector
from fedsim.models.boxes import giou, iou, suppressed

UNET = {"channels": [4, 8, 8], "groups": 2}
DETECTOR = {"channels": [16, 32, 32, 64, 64], "groups": 4}


def test_a_unet_gives_a_class_for_every_pixel_of_any_size():
    model = models.UNet((3, 16, 16), 5, **UNET)
    for size in ((16, 16), (13, 9)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 5, *size)
    with pytest.raises(ConfigError, match="at least 4x4"):
        models.UNet((1, 3, 8), 2, **UNET)


def test_a_unet_learns_to_tell_bright_pixels():
    torch.manual_seed(0)
    model, x = models.UNet((1, 8, 8), 2, **UNET), torch.randn(16, 1, 8, 8)
    y = (x[:, 0] > 0).long()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(40):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    assert (model(x).argmax(1) == y).double().mean() > 0.95


def test_parts_of_a_detector_are_told_apart_by_name():
    model = models.Detector((3, 64, 64), 3, **DETECTOR)
    sizes = dict.fromkeys(("backbone", "neck", "head"), 0)
    for name, p in model.named_parameters():
        sizes[name.partition(".")[0]] += p.numel()
    assert sum(sizes.values()) == 109_592 and min(sizes.values()) == 64 * 8 + 8
    assert model(torch.randn(2, 3, 64, 48)).shape == (2, 8, 16, 12)


def test_overlaps_of_two_boxes_by_hand():
    a, b = torch.tensor([0.0, 0, 4, 2]), torch.tensor([2.0, 0, 6, 2])
    assert iou(a, b).item() == pytest.approx(4 / 12)
    assert giou(a, b).item() == pytest.approx(4 / 12)  # their hull holds nothing else
    far = torch.tensor([8.0, 0, 12, 2])
    assert iou(a, far).item() == 0 and giou(a, far).item() == pytest.approx(-8 / 24)


def encoded(boxes, labels, shape):
    """The output of a detector that is sure: each box in the cell of its centre."""
    out = torch.full((1, 8, *shape), -20.0)
    for box, label in zip(boxes, labels, strict=True):
        x, y = int((box[0] + box[2]) / 2) // 4, int((box[1] + box[3]) / 2) // 4
        cx, cy = 4 * x + 2, 4 * y + 2
        distances = [cx - box[0], cy - box[1], box[2] - cx, box[3] - cy]
        out[0, 0, y, x] = out[0, 1 + label, y, x] = 20.0
        out[0, 4:, y, x] = torch.tensor([math.log(math.expm1(d / 4)) for d in distances])
    return out


def test_what_cells_say_becomes_boxes_again():
    boxes, labels = [(3.0, 5.0, 13.0, 15.0), (20.0, 2.0, 31.0, 13.0)], [2, 0]
    found = detector.decode(encoded(boxes, labels, (8, 8)), top=5)
    assert found["labels"].tolist() == [[2, 0, -1, -1, -1]] or found["labels"].tolist() == [
        [0, 2, -1, -1, -1]
    ]
    order = found["labels"][0, :2].argsort(descending=True)
    torch.testing.assert_close(found["boxes"][0, :2][order], torch.tensor(boxes), atol=1e-3, rtol=0)
    assert found["boxes"][0, 2:].abs().sum() == 0 and found["scores"][0, 2:].sum() == 0
    assert torch.allclose(found["scores"][0, :2], torch.ones(2), atol=1e-6)


def test_cells_near_a_centre_are_to_find_the_box():
    y = {"boxes": torch.tensor([[[3.0, 5, 13, 15], [0, 0, 0, 0]]]), "labels": torch.tensor([[2, -1]])}
    middle = detector.centres(torch.zeros(1, 8, 8, 8))
    want = detector.assigned(middle, y)
    near = (middle - torch.tensor([8.0, 10.0])).norm(dim=1) <= 3.6
    assert torch.equal(want.positive[0], near) and near.sum() == 2  # centres (6, 10) and (10, 10)
    assert (want.labels[0][near] == 2).all() and (want.boxes[0][near] == y["boxes"][0, 0]).all()


def test_the_loss_is_the_sum_of_its_three_parts():
    torch.manual_seed(0)
    output = torch.randn(2, 8, 8, 8)
    y = {
        "boxes": torch.tensor([[[3.0, 5, 13, 15]], [[0.0, 0, 0, 0]]]),
        "labels": torch.tensor([[2], [-1]]),
    }
    found, bce = detector.cells(output), torch.nn.functional.binary_cross_entropy_with_logits
    at = [2 * 8 + 1, 2 * 8 + 2]
    here = torch.zeros(64)
    here[at] = 1
    expected = 0.7 * bce(found.objectness[0], here)
    expected += 0.3 * bce(found.classes[0, at], torch.tensor([[0.0, 0, 1]] * 2))
    expected += 2 * (1 - giou(found.boxes[0, at], y["boxes"][0])).mean()
    empty = 0.7 * bce(found.objectness[1], torch.zeros(64))  # nothing but background
    torch.testing.assert_close(detector.losses(output, y), torch.stack([expected, empty]))
    assert detector.loss(output, y) == detector.losses(output, y).mean()
    no_places = {"boxes": torch.zeros(2, 0, 4), "labels": torch.zeros(2, 0, dtype=torch.long)}
    assert detector.losses(output, no_places)[1] == detector.losses(output, y)[1]


def test_the_best_boxes_of_all_cells_are_found_however_many_are_sure(monkeypatch):
    """More sure cells than boxes that are kept, whose first ones overlap."""
    monkeypatch.setattr(detector, "PAIRS", 3 * 64**2)  # images by three
    torch.manual_seed(0)
    output = torch.randn(4, 8, 8, 8)
    cells = detector.cells(output)
    scores, boxes = cells.objectness.sigmoid() * cells.classes.sigmoid().amax(-1), cells.boxes.clamp(0, 32)
    labels = cells.classes.argmax(-1)
    found = detector.decode(output, top=10)
    for i in range(4):
        kept = list[int]()
        for j in scores[i].argsort(descending=True).tolist():
            rivals = [k for k in kept if labels[i, k] == labels[i, j]]
            if len(kept) < 10 and all(iou(boxes[i, j], boxes[i, k]) <= 0.65 for k in rivals):
                kept.append(j)
        assert torch.equal(found["boxes"][i], boxes[i][kept]) and torch.equal(
            found["scores"][i], scores[i][kept]
        )
        assert found["labels"][i].tolist() == labels[i][kept].tolist()


def test_suppression_is_the_plain_loop():
    torch.manual_seed(0)
    corner = 20 * torch.rand(3, 40, 2)
    boxes = torch.cat([corner, corner + 5 + 10 * torch.rand(3, 40, 2)], dim=-1)
    labels, kept = torch.randint(2, (3, 40)), torch.rand(3, 40) > 0.1
    found = suppressed(boxes, labels, kept, 0.4)
    for b in range(3):
        remain: list[int] = []
        for i in range(40):
            rivals = [
                j for j in remain if labels[b, j] == labels[b, i] and iou(boxes[b, j], boxes[b, i]) > 0.4
            ]
            if kept[b, i] and not rivals:
                remain.append(i)
        assert found[b].nonzero().flatten().tolist() == remain


@pytest.mark.parametrize(
    ("shape", "classes", "options", "words"),
    [
        ((3, 60, 64), 3, {}, "multiples of 8, data gives 60x64"),
        ((3, 64, 64), 0, {}, "data=weather_shapes"),
        ((3, 64, 64), 3, {"channels": [8, 8]}, "give 5 numbers"),
    ],
)
def test_impossible_detectors_are_refused(shape, classes, options, words):
    with pytest.raises(ConfigError, match=words):
        models.Detector(shape, classes, **DETECTOR | options)
