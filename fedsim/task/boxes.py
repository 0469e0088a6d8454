"""Boxes of objects in images: overlap, suppression, and the loss and the boxes of ``fedsim.models.Detector``.

Boxes are (x1, y1, x2, y2) in pixels. Those of a batch are padded: ``{"boxes": (B, M, 4), "labels": (B, M) int64}``, with
label -1 where there is no box.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.models.detector import STRIDE

RADIUS = 3.6  # pixels around a box's centre within which cells are to find it
WEIGHTS = (0.7, 0.3, 2.0)  # of objectness, class and box in the loss
Boxes = Mapping[str, Tensor]


class Cells(NamedTuple):
    """What a detector says of its cells: ``objectness`` (B, N) and ``classes`` (B, N, C), logits, ``boxes`` (B, N, 4)."""

    objectness: Tensor
    classes: Tensor
    boxes: Tensor


class Wanted(NamedTuple):
    """What cells are to say: whether they hold an object (B, N) bool, its label (B, N) and box (B, N, 4)."""

    positive: Tensor
    labels: Tensor
    boxes: Tensor


def area(boxes: Tensor) -> Tensor:
    """Areas (...) of boxes (..., 4); 0 for one without width or height."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersections and unions (...) of boxes (..., 4), pair by pair; shapes are broadcast."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared, area(a) + area(b) - shared


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (...) in [0, 1]; 0 for two empty boxes."""
    shared, union = overlaps(a, b)
    return shared / union.clamp(min=1e-9)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (...) in [-1, 1] (Rezatofighi et al. 2019): IoU minus the part of the hull that neither covers."""
    shared, union = overlaps(a, b)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1).clamp(min=1e-9)
    return shared / union.clamp(min=1e-9) - (hull - union) / hull


def suppressed(boxes: Tensor, labels: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: which of ``boxes`` (B, K, 4), best first, remain of those ``kept`` (B, K) bool.

    A box falls if a better one that remains has its label (B, K) and more than ``threshold`` IoU with it.
    """
    rivals = iou(boxes[:, :, None], boxes[:, None, :]) > threshold
    rivals &= labels[:, :, None] == labels[:, None, :]
    out = kept.clone()
    for i in range(boxes.shape[1] - 1):
        out[:, i + 1 :] &= ~(out[:, i : i + 1] & rivals[:, i, i + 1 :])
    return out


def cells(output: Tensor) -> Cells:
    """A detector's output (B, 1 + C + 4, h, w) by cell, N = h w; boxes in pixels."""
    numbers = output.flatten(2).transpose(1, 2)
    middle = centres(output)
    near, far = (STRIDE * F.softplus(numbers[..., -4:])).chunk(2, dim=-1)
    return Cells(numbers[..., 0], numbers[..., 1:-4], torch.cat([middle - near, middle + far], dim=-1))


def centres(output: Tensor) -> Tensor:
    """Centres (N, 2), x and y in pixels, of the cells of an output (..., h, w)."""
    y, x = (STRIDE * (torch.arange(n, dtype=output.dtype, device=output.device) + 0.5) for n in output.shape[-2:])
    grid: Tensor = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1).flatten(0, 1)
    return grid


def assigned(middle: Tensor, y: Boxes) -> Wanted:
    """For each cell, by its centre (N, 2), the box whose centre is nearest, if it is within ``RADIUS``."""
    boxes, labels = y["boxes"].to(middle.dtype), y["labels"]
    if not boxes.shape[1]:
        boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
    apart = ((boxes[:, :, None, :2] + boxes[:, :, None, 2:]) / 2 - middle).norm(dim=-1)  # (B, M, N)
    distance, which = apart.masked_fill(labels[:, :, None] < 0, torch.inf).min(dim=1)
    box = boxes.gather(1, which[..., None].expand(-1, -1, 4))
    return Wanted(distance <= RADIUS, labels.gather(1, which), box)


def detection_losses(output: Tensor, y: Boxes) -> Tensor:
    """Loss (B,) of each image: binary cross entropy of objectness, mean over cells, and over the cells that hold an
    object binary cross entropy of the classes and 1 - GIoU of the box; weighted by ``WEIGHTS``."""
    found, want = cells(output), assigned(centres(output), y)
    here = want.positive.to(output.dtype)
    share = here / here.sum(dim=1, keepdim=True).clamp(min=1)
    one_hot = F.one_hot(want.labels.clamp(min=0), found.classes.shape[-1]).to(output.dtype)
    classes = F.binary_cross_entropy_with_logits(found.classes, one_hot, reduction="none").mean(-1)
    objectness = F.binary_cross_entropy_with_logits(found.objectness, here, reduction="none").mean(-1)
    box = 1 - giou(found.boxes, want.boxes)
    parts = (objectness, (share * classes).sum(1), (share * box).sum(1))
    return torch.stack([weight * part for weight, part in zip(WEIGHTS, parts, strict=True)]).sum(0)


def detection_loss(output: Tensor, y: Boxes) -> Tensor:
    """Mean over the batch of ``detection_losses``."""
    return detection_losses(output, y).mean()


def decode(output: Tensor, *, score: float = 0.05, threshold: float = 0.65, top: int = 100) -> dict[str, Tensor]:
    """Boxes of a detector's output, best first, padded like targets, at most ``top`` an image.

    A cell's score is objectness times its likeliest class; those above ``score`` go through non-maximum suppression at
    IoU ``threshold``. Gives ``boxes`` (B, K, 4), inside the image, ``labels`` (B, K), -1 where there is none, ``scores``
    and ``objectness`` (B, K).
    """
    found = cells(output.detach())
    likeliest, labels = found.classes.sigmoid().max(dim=-1)
    objectness = found.objectness.sigmoid()
    scores, order = (objectness * likeliest).sort(dim=1, descending=True, stable=True)
    scores, order = scores[:, :top], order[:, :top]
    height, width = (STRIDE * n for n in output.shape[-2:])
    boxes = found.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    labels = labels.gather(1, order)
    kept = suppressed(boxes, labels, scores > score, threshold)
    order = order.gather(1, first := (~kept).long().argsort(dim=1, stable=True))
    kept = kept.gather(1, first)
    return {
        "boxes": boxes.gather(1, first[..., None].expand(-1, -1, 4)) * kept[..., None],
        "labels": labels.gather(1, first).masked_fill(~kept, -1),
        "scores": scores.gather(1, first) * kept,
        "objectness": objectness.gather(1, order) * kept,
    }
