"""Boxes in images: areas, overlap, and the suppression of those that say the same. Boxes are (x1, y1, x2, y2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    """Generalised IoU (...) in [-1, 1] (Rezatofighi et al. 2019): IoU minus the share of the hull outside both."""
    shared, union = overlaps(a, b)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1).clamp(min=1e-9)
    return shared / union.clamp(min=1e-9) - (hull - union) / hull


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU (...) (Zheng et al. 2020): ``IoU - d^2/c^2 - alpha v``, d the distance of the centres, c the hull's
    diagonal, ``v = 4/pi^2 (atan(w_b/h_b) - atan(w_a/h_a))^2``, ``alpha = v/(1 - IoU + v)``, which gets no gradient."""
    overlap = iou(a, b)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    diagonal = (high - low).square().sum(-1).clamp(min=1e-9)
    apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
    v = 4 / math.pi**2 * (_slope(b) - _slope(a)).square()
    with torch.no_grad():
        alpha = v / (1 - overlap + v).clamp(min=1e-9)
    return overlap - apart / diagonal - alpha * v


def _slope(boxes: Tensor) -> Tensor:
    """Angles (...) of the diagonals, from the vertical."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return torch.atan(width / height.clamp(min=1e-9))


def right_ones(
    boxes: Tensor, labels: Tensor, scores: Tensor, there: Tensor, classes: Tensor, least: float = 0.5
) -> Tensor:
    """How many of ``boxes`` (B, K, 4) with ``labels`` (B, K) are right, (B,): the surer first, each takes the box
    ``there`` (B, M, 4) of its class, of ``classes`` (B, M), that it overlaps most and that nobody has, if by ``least``
    IoU. Labels below 0 are no boxes."""
    order = scores.masked_fill(labels < 0, -math.inf).argsort(dim=1, descending=True, stable=True)
    boxes, labels = boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)
    free, right = classes >= 0, torch.zeros(len(boxes), dtype=torch.long)
    if not there.shape[1]:
        return right
    for box, label in zip(boxes.unbind(1), labels.unbind(1), strict=True):
        shared = iou(box[:, None].double(), there.double())
        most, which = shared.masked_fill(~free | (classes != label[:, None]), -1).max(dim=1)
        hit = (most >= least) & (label >= 0)
        free[hit, which[hit]] = False
        right += hit
    return right


def suppressed(boxes: Tensor, labels: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: which of ``boxes`` (B, K, 4), best first, remain of those ``kept`` (B, K) bool.

    A box falls if a better one that remains has its label (B, K) and more than ``threshold`` IoU with it.
    """
    rivals = iou(boxes[:, :, None], boxes[:, None, :]) > threshold
    rivals &= labels[:, :, None] == labels[:, None, :]
    rivals &= torch.ones(rivals.shape[1:], dtype=torch.bool, device=rivals.device).tril(
        -1
    )  # better ones alone
    out = kept
    for _ in range(
        boxes.shape[1]
    ):  # the first i boxes are settled after i turns, mostly all after two or three
        before, out = out, kept & ~(rivals & out[:, None, :]).any(-1)
        if torch.equal(before, out):
            break
    return out
