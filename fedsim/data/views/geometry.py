"""Pixels that move, and what moves with them: boxes and maps.

A move is ``back`` (B, 2, 3), one affine map per sample: the point ``p`` of the new image shows the point
``back[:, :, :2] p + back[:, :, 2]`` of the old one. Points are (x, y) in pixels, (0, 0) the upper left corner of the
image and (W, H) its lower right one, so that pixel centres lie at halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

UNKNOWN_CLASS = -100  # what a map of classes says where nothing is known: cross entropy leaves it out


def unmoved(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Moves (count, 2, 3) that move nothing, float64."""
    return torch.eye(2, 3, dtype=torch.float64, device=device).repeat(count, 1, 1)


def translations(right: Tensor, down: Tensor) -> Tensor:
    """Moves by ``right`` and ``down`` pixels, (B,) each."""
    back = unmoved(len(right), right.device)
    back[:, 0, 2], back[:, 1, 2] = -right, -down
    return back


def mirrored(chosen: Tensor, width: int) -> Tensor:
    """Moves that mirror the ``chosen`` samples (B,) left to right."""
    back = unmoved(len(chosen), chosen.device)
    back[chosen, 0, 0], back[chosen, 0, 2] = -1, width
    return back


def windows(x: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """Of images ``x`` (B, C, H, W) with ``pad`` zero pixels on all sides, the windows (H, W) at ``top``, ``left``."""
    height, width = x.shape[-2:]
    views = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    return views[torch.arange(len(x), device=x.device), :, top, left]


def resampled(x: Tensor, back: Tensor, *, bilinear: bool = False) -> Tensor:
    """Images ``x`` (B, C, H, W), of any number type, moved; what comes from outside is zero.

    Nearest pixels by default, which keeps every number as it was.
    """
    height, width = x.shape[-2:]
    numbers = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    kind, device = numbers.dtype, x.device
    a, b, c, d, e, f = back.to(kind).reshape(-1, 6, 1, 1).unbind(1)
    right = torch.arange(width, dtype=kind, device=device) + 0.5
    down = (torch.arange(height, dtype=kind, device=device) + 0.5).view(-1, 1)
    across, along = a * right + b * down + c, d * right + e * down + f
    grid = torch.stack((across * (2 / width) - 1, along * (2 / height) - 1), dim=-1)
    mode = "bilinear" if bilinear else "nearest"
    out = F.grid_sample(numbers, grid, mode=mode, padding_mode="zeros", align_corners=False)
    if x.dtype == kind:
        return out
    return (out if x.is_floating_point() or not bilinear else out.round_()).to(x.dtype)


def moved(y: Any, back: Tensor, size: tuple[int, int], visible: float) -> Any:
    """Targets moved with images of ``size`` (H, W): boxes, or maps with the images' pixels (``has_places``)."""
    if isinstance(y, Mapping) and "boxes" in y:
        return _boxes_moved(y, back, size, visible)
    if isinstance(y, Mapping):
        return {k: moved(v, back, size, visible) if has_places(v, size) else v for k, v in y.items()}
    return map_moved(y, back)


def has_places(y: Any, size: tuple[int, int]) -> bool:
    """Whether targets lie somewhere in images of ``size`` (H, W): boxes, or maps (B, H, W) and (B, C, H, W)."""
    if isinstance(y, Mapping):
        return "boxes" in y or any(has_places(v, size) for v in y.values())
    return isinstance(y, Tensor) and y.dim() in (3, 4) and tuple(y.shape[-2:]) == size


def settled(
    y: Mapping[str, Any], boxes: Tensor, frame: Tensor | tuple[int, ...], visible: float
) -> dict[str, Any]:
    """``y`` with ``boxes`` (B, M, 4) clipped to ``frame`` (left, top, right, bottom); broadcastable to the boxes.

    One of which less than the share ``visible`` of its area is left becomes zeros with the label -1, as those are that
    were none before.
    """
    edges = torch.as_tensor(frame, dtype=boxes.dtype, device=boxes.device)
    low, high = edges[..., :2], edges[..., 2:]
    clipped = torch.cat((boxes[..., :2].clamp(low, high), boxes[..., 2:].clamp(low, high)), dim=-1)
    left, whole = _area(clipped), _area(boxes)
    keep = (y["labels"] >= 0) & (left > 0) & (left >= visible * whole)
    return {
        **y,
        "boxes": torch.where(keep[..., None], clipped, 0).to(y["boxes"].dtype),
        "labels": torch.where(keep, y["labels"], -1),
    }


def corners(boxes: Tensor, back: Tensor) -> Tensor:
    """The boxes (B, M, 4), float64, around where the corners of ``boxes`` come to lie."""
    turn, shift = back[:, :, :2].double(), back[:, :, 2].double()
    (a, b), (c, d) = turn[:, 0].unbind(1), turn[:, 1].unbind(1)
    determinant = a * d - b * c
    forth = torch.stack((d, -b, -c, a), dim=1) / determinant.unsqueeze(1)
    x, y = boxes[..., [0, 2, 0, 2]].double(), boxes[..., [1, 1, 3, 3]].double()
    x, y = x - shift[:, 0].view(-1, 1, 1), y - shift[:, 1].view(-1, 1, 1)
    a, b, c, d = forth.reshape(-1, 4, 1, 1).unbind(1)
    across, along = a * x + b * y, c * x + d * y
    ends = (across.amin(-1), along.amin(-1), across.amax(-1), along.amax(-1))
    return torch.stack(ends, dim=-1)


def _boxes_moved(y: Mapping[str, Any], back: Tensor, size: tuple[int, int], visible: float) -> dict[str, Any]:
    height, width = size
    return settled(y, corners(y["boxes"], back), (0, 0, width, height), visible)


def map_moved(y: Tensor, back: Tensor) -> Tensor:
    """A map (B, H, W) or (B, C, H, W) moved by nearest pixels; outside is unknown for classes, and 0 for numbers."""
    outside = UNKNOWN_CLASS if y.dtype in (torch.int64, torch.int32) else 0
    planes = y.unsqueeze(1) if y.dim() == 3 else y
    out = resampled(planes - outside if outside else planes, back)
    return (out + outside if outside else out).view(y.shape)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
