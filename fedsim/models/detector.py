"""A small anchor-free detector: for every cell of an image, whether there is an object, which one, and its box.

Boxes are (x1, y1, x2, y2) in pixels. Those of a batch are padded, ``{"boxes": (B, M, 4), "labels": (B, M)}``, with
label -1 where there is no box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.models.boxes import ciou, giou, suppressed
from fedsim.models.layers import conv_layer, image_shape, norm_layer

STRIDE = 4  # pixels of a cell's side
RADIUS = 3.6  # pixels around a box's centre within which cells are to find it
CANDIDATES = 1000  # cells of an image among which overlapping boxes are looked for
PAIRS = 4_000_000  # of them that are compared at once, to bound memory
WEIGHTS = (0.7, 0.3, 2.0)  # of objectness, class and box in the loss
Boxes = Mapping[str, Tensor]


class Detector(nn.Module):
    """Images (B, 3, H, W) to numbers of cells (B, 1 + C + 4, H/4, W/4): objectness logit, class logits, box.

    In the manner of FCOS (Tian et al. 2019): a box is four distances from the cell's centre, ``STRIDE * softplus`` of
    its numbers, to left, top, right and bottom: ``loss`` and ``decode`` read them.
    Parameters of the three parts are ``backbone.*``, ``neck.*`` and ``head.*``.

    Args:
        input_shape: (C, H, W); H and W are multiples of 8.
        num_classes: C.
        channels: of the backbone's five blocks of convolution, GroupNorm and SiLU, with strides 2, 2, 1, 2, 1.
        groups: groups of each GroupNorm; divides all channels.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, channels: Sequence[int], groups: int
    ) -> None:
        super().__init__()
        inputs, height, width = image_shape(input_shape, "detector", smallest=16)
        if height % 8 or width % 8:
            raise ConfigError(
                f"model=detector needs sides that are multiples of 8, data gives {height}x{width}"
            )
        if len(channels) != 5:
            raise ConfigError(f"model.channels={list(channels)}: give 5 numbers, one for each block")
        if not num_classes:
            raise ConfigError("model=detector: the data has no classes; type data=weather_shapes")
        self.backbone = Backbone(inputs, channels, groups)
        self.neck = Neck(channels[2], channels[4], groups)
        self.head = nn.Conv2d(channels[4], 1 + num_classes + 4, 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # type: ignore[index]  # few cells hold an object

    def forward(self, x: Tensor) -> Tensor:
        """Numbers of the cells (B, 1 + C + 4, H/4, W/4)."""
        out: Tensor = self.head(self.neck(*self.backbone(x)))
        return out


class Backbone(nn.Module):
    """Five blocks; gives the maps after the third, at stride 4, and the last, at stride 8."""

    def __init__(self, inputs: int, channels: Sequence[int], groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _block(a, b, stride, groups)
            for a, b, stride in zip((inputs, *channels), channels, (2, 2, 1, 2, 1), strict=False)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to (B, channels[2], H/4, W/4) and (B, channels[4], H/8, W/8)."""
        for block in self.blocks[:3]:
            x = block(x)
        fine = x
        for block in self.blocks[3:]:
            x = block(x)
        return fine, x


class Neck(nn.Module):
    """Brings the fine map to the coarse one's channels (1x1), adds that one upsampled, and mixes both (3x3)."""

    def __init__(self, fine: int, coarse: int, groups: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(fine, coarse, 1)
        self.mix = _block(coarse, coarse, 1, groups)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B, coarse, H/4, W/4)."""
        out: Tensor = self.mix(self.lateral(fine) + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        return out


def _block(inputs: int, outputs: int, stride: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        conv_layer(inputs, outputs, 3, stride), norm_layer(outputs, "group", groups), nn.SiLU()
    )


class Cells(NamedTuple):
    """What a detector says of its cells: logits ``objectness`` (B, N), ``classes`` (B, N, C); ``boxes`` (B, N, 4)."""

    objectness: Tensor
    classes: Tensor
    boxes: Tensor


class Wanted(NamedTuple):
    """What cells are to say: whether they hold an object (B, N) bool, its label (B, N) and box (B, N, 4); and ``which``
    of the M boxes that is (B, N)."""

    positive: Tensor
    labels: Tensor
    boxes: Tensor
    which: Tensor


def cells(output: Tensor) -> Cells:
    """A detector's output (B, 1 + C + 4, h, w) by cell, N = h w; boxes in pixels."""
    numbers = output.flatten(2).transpose(1, 2)
    middle = centres(output)
    near, far = (STRIDE * F.softplus(numbers[..., -4:])).chunk(2, dim=-1)
    return Cells(numbers[..., 0], numbers[..., 1:-4], torch.cat([middle - near, middle + far], dim=-1))


def centres(output: Tensor) -> Tensor:
    """Centres (N, 2), x and y in pixels, of the cells of an output (..., h, w)."""
    y, x = (
        STRIDE * (torch.arange(n, dtype=output.dtype, device=output.device) + 0.5) for n in output.shape[-2:]
    )
    return torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], dim=-1)


def assigned(middle: Tensor, y: Boxes) -> Wanted:
    """For each cell, by its centre (N, 2), the box whose centre is nearest, if it is within ``RADIUS``."""
    boxes, labels = y["boxes"].to(middle.dtype), y["labels"]
    if not boxes.shape[1]:
        boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
    apart = ((boxes[:, :, None, :2] + boxes[:, :, None, 2:]) / 2 - middle).norm(dim=-1)  # (B, M, N)
    distance, which = apart.masked_fill(labels[:, :, None] < 0, torch.inf).min(dim=1)
    box = boxes.gather(1, which[..., None].expand(-1, -1, 4))
    return Wanted(distance <= RADIUS, labels.gather(1, which), box, which)


def losses(output: Tensor, y: Boxes) -> Tensor:
    """Loss (B,) of each image: binary cross entropy of objectness, mean over cells, and over the cells that hold an
    object binary cross entropy of the classes and 1 - GIoU of the box; weighted by ``WEIGHTS``.

    Raises:
        ConfigError: for the output of another model, or targets that are no boxes.
    """
    if not isinstance(output, Tensor) or output.dim() != 4 or not isinstance(y, Mapping):
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        given = "boxes" if isinstance(y, Mapping) else "no boxes"
        raise ConfigError(
            f"task=detection: its loss takes what model=detector gives, (n, 1 + C + 4, h, w), and boxes, not {shown} "
            f"and {given}; type model=detector with data=weather_shapes or coco, or your own task.loss and task.decode"
        )
    found, want = cells(output), assigned(centres(output), y)
    here = want.positive.to(output.dtype)
    share = here / here.sum(dim=1, keepdim=True).clamp(min=1)
    one_hot = F.one_hot(want.labels.clamp(min=0), found.classes.shape[-1]).to(output.dtype)
    classes = F.binary_cross_entropy_with_logits(found.classes, one_hot, reduction="none").mean(-1)
    objectness = F.binary_cross_entropy_with_logits(found.objectness, here, reduction="none").mean(-1)
    box = 1 - giou(found.boxes, want.boxes)
    parts = (objectness, (share * classes).sum(1), (share * box).sum(1))
    return torch.stack([weight * part for weight, part in zip(WEIGHTS, parts, strict=True)]).sum(0)


def loss(output: Tensor, y: Boxes) -> Tensor:
    """Mean over the batch of ``losses``."""
    return losses(output, y).mean()


def part_losses(output: Tensor, y: Boxes) -> dict[str, Tensor]:
    """Losses ``class``, ``objectness`` and ``box`` (B,) on boxes that need not count for all of them.

    Beside boxes and labels ``y`` has, for each box (B, M): ``objectness``, what its cells are to say (0 elsewhere), and
    whether it counts for the class (``classed``) and for the box (``boxed``). As in ``losses``, objectness is a mean
    over cells, the others over the cells that count; the box's is 1 - CIoU.
    """
    found, want = cells(output), assigned(centres(output), y)

    def of_cells(name: str) -> Tensor:
        picked = F.pad(y[name].to(output.dtype), (0, 1)).gather(1, want.which)
        return picked * want.positive

    def mean(loss: Tensor, counts: Tensor) -> Tensor:
        return (counts * loss).sum(1) / counts.sum(1).clamp(min=1)

    one_hot = F.one_hot(want.labels.clamp(min=0), found.classes.shape[-1]).to(output.dtype)
    classes = F.binary_cross_entropy_with_logits(found.classes, one_hot, reduction="none").mean(-1)
    wanted = of_cells("objectness")
    objectness = F.binary_cross_entropy_with_logits(found.objectness, wanted, reduction="none").mean(-1)
    box = 1 - ciou(found.boxes, want.boxes)
    return {
        "class": mean(classes, of_cells("classed")),
        "objectness": objectness,
        "box": mean(box, of_cells("boxed")),
    }


def decode(
    output: Tensor, *, score: float = 0.05, threshold: float = 0.65, top: int = 100
) -> dict[str, Tensor]:
    """Boxes of a detector's output, best first, padded like targets, at most ``top`` an image.

    A cell's score is objectness times its likeliest class; those above ``score``, the best ``CANDIDATES`` of them, go
    through non-maximum suppression at IoU ``threshold``. Gives ``boxes`` (B, K, 4), inside the image, ``labels``
    (B, K), -1 where there is none, and ``scores`` and ``objectness`` (B, K).
    """
    found = cells(output.detach())
    likeliest, labels = found.classes.sigmoid().max(dim=-1)
    objectness = found.objectness.sigmoid()
    scores, order = (objectness * likeliest).sort(dim=1, descending=True, stable=True)
    places = min(top, scores.shape[1])
    most = max(1, min(CANDIDATES, int((scores > score).sum(dim=1).max())))  # the others cannot be kept
    scores, order = scores[:, :most], order[:, :most]
    height, width = (STRIDE * n for n in output.shape[-2:])
    boxes = found.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    labels = labels.gather(1, order)
    few = max(1, PAIRS // most**2)  # images that are looked at together
    parts = [torch.split(t, few) for t in (boxes, labels, scores > score)]
    kept = torch.cat(
        [suppressed(box, label, sure, threshold) for box, label, sure in zip(*parts, strict=True)]
    )
    order = order.gather(1, first := (~kept).long().argsort(dim=1, stable=True)[:, :places])
    kept = kept.gather(1, first)
    left = places - kept.shape[1]  # padding that was not looked at
    return {
        "boxes": F.pad(
            boxes.gather(1, first[..., None].expand(-1, -1, 4)) * kept[..., None], (0, 0, 0, left)
        ),
        "labels": F.pad(labels.gather(1, first).masked_fill(~kept, -1), (0, left), value=-1),
        "scores": F.pad(scores.gather(1, first) * kept, (0, left)),
        "objectness": F.pad(objectness.gather(1, order) * kept, (0, left)),
    }
