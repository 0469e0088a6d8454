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
