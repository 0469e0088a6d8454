"""Boxes in images: areas, overlap, and the suppression of those that say the same. Boxes are (x1, y1, x2, y2)."""

from __future__ import annotations

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
