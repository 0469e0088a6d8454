"""The bare loop of FedSTO: a round of either phase in plain torch, as the yardstick of ``detection``.

One process, no framework: images and boxes in memory, torch's SGD, a teacher in a second module, views on whole
batches, losses of the cells that count alone, boxes of a batch suppressed together, models averaged in place. The
detector's module, sizes and settings are those of ``experiment=fedsto_weather``; all else is written here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.models.detector import Detector

BATCH, LR, MOMENTUM, ALPHA, LAM = 16, 0.015, 0.9, 0.99, 1e-4
LO, HI, SURE, OVERLAP = 0.1, 0.6, 0.99, 0.65
STRIDE, RADIUS = 4, 3.6
Boxes = tuple[Tensor, Tensor]  # (B, M, 4), labels (B, M), -1 where there is none


@dataclass
class Bare:
    """``server`` and ``clients``: images (N, 3, S, S) uint8, boxes (N, M, 4) and labels (N, M), of which clients' are
    never looked at."""

    model: Detector
    server: tuple[Tensor, Tensor, Tensor]
    clients: Sequence[Tensor]
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.model.train()
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.all = list(self.model.parameters())
        self.outside = [p for n, p in self.model.named_parameters() if not n.startswith("backbone.")]
        self.sgd = torch.optim.SGD(self.all, LR, MOMENTUM)

    def round(self, selective: bool) -> None:
        """One round: every client from the same model, their mean, a pass of the server."""
        start = [p.detach().clone() for p in self.all]
        total = [torch.zeros_like(p) for p in start]
        for images in self.clients:
            self._load(start)
            self._client(images, selective)
            torch._foreach_add_(total, [p.detach() for p in self.all], alpha=1 / len(self.clients))
        self._load(total)
        self.serve(not selective)

    def serve(self, penalised: bool) -> None:
        """One pass over the server's images; its momentum goes on."""
        x, boxes, labels = self.server
        for rows in torch.randperm(len(x), generator=self.rng).split(BATCH):
            shown, move = weak(x[rows] / 255, self.rng)
            y = moved(boxes[rows], labels[rows], move, shown.shape[-1])
            self._descend(self.sgd, server_loss(self.model(normal(shown)), *y), penalised)

    def _load(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.all, list(values))

    def _client(self, x: Tensor, selective: bool) -> None:
        teacher = list(self.teacher.parameters())
        torch._foreach_copy_(teacher, [p.detach() for p in self.all])
        for p in self.outside:
            p.requires_grad_(not selective)
        sgd = torch.optim.SGD([p for p in self.all if p.requires_grad], LR, MOMENTUM)
        for rows in torch.randperm(len(x), generator=self.rng).split(BATCH):
            shown, _ = weak(x[rows] / 255, self.rng)
            with torch.no_grad():
                found = decoded(self.teacher(normal(shown)))
            output = self.model(normal(strong(shown, self.rng)))
            self._descend(sgd, client_loss(output, *found), not selective)
            torch._foreach_lerp_(teacher, [p.detach() for p in self.all], 1 - ALPHA)
        for p in self.outside:
            p.requires_grad_(True)

    def _descend(self, sgd: torch.optim.SGD, loss: Tensor, penalised: bool) -> None:
        if penalised:
            loss = loss + LAM * sum(omega(p) for p in self.outside if p.dim() > 1)
        sgd.zero_grad()
        loss.backward()
        sgd.step()


def normal(x: Tensor) -> Tensor:
    """What the model is shown of pixels in [0, 1]."""
    return (x - 0.5) / 0.25


def weak(x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images mirrored and scaled about their middles, and by what (B, 2): factors across and down."""
    u = torch.rand(len(x), 2, generator=rng)
    scale = 0.9 + 0.2 * u[:, 0]
    move = torch.stack([torch.where(u[:, 1] < 0.5, -scale, scale), scale], dim=1)
    back = x.new_zeros(len(x), 2, 3)
    back[:, 0, 0], back[:, 1, 1] = 1 / move[:, 0], 1 / move[:, 1]
    grid = F.affine_grid(back, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False), move


def moved(boxes: Tensor, labels: Tensor, move: Tensor, side: int) -> Boxes:
    """Boxes that go with the images; those of which less than a quarter is left are dropped."""
    middle, factor = side / 2, move.repeat(1, 2)[:, None]
    ends = (boxes - middle) * factor + middle
    ends = torch.cat(
        [torch.minimum(ends[..., :2], ends[..., 2:]), torch.maximum(ends[..., :2], ends[..., 2:])], -1
    )
    cut = ends.clamp(0, side)
    left, whole = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (cut, ends))
    return cut, torch.where((labels >= 0) & (left > 0) & (left >= 0.25 * whole), labels, -1)


def strong(x: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation, grey and blur by chance, and a grey square."""
    u = torch.rand(len(x), 9, generator=rng)
    jitter = torch.where(u[:, :1] < 0.8, 0.6 + 0.8 * u[:, 1:4], 1.0)[:, :, None, None, None]
    x = (x * jitter[:, 0]).clamp_(0, 1)
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    x = torch.lerp(mean, x, jitter[:, 1]).clamp_(0, 1)
    x = torch.lerp(grey(x), x, jitter[:, 2]).clamp_(0, 1)
    x = torch.where((u[:, 4] < 0.2)[:, None, None, None], grey(x), x)
    at = (u[:, 5] < 0.5).nonzero().flatten()
    x[at] = blurred(x[at], 0.1 + 1.9 * u[at, 6])
    side, places = round(0.2 * x.shape[-1]), torch.arange(x.shape[-1])
    first = (u[:, 7:] * x.shape[-1]).long() - side // 2
    inside = (places >= first[..., None]) & (places < first[..., None] + side)
    return x.masked_fill_((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0.5)


def grey(x: Tensor) -> Tensor:
    """Brightness (B, 1, S, S)."""
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def blurred(x: Tensor, sigma: Tensor, reach: int = 3) -> Tensor:
    """Gaussian blur, each image by its own sigma (B,)."""
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma[:, None]) ** 2)
    weight = (weight / weight.sum(1, keepdim=True))[:, :, None, None, None]
    side = x.shape[-1]
    wide = F.pad(x, (reach, reach, 0, 0), mode="reflect")
    x = sum(weight[:, k] * wide[..., k : k + side] for k in range(2 * reach + 1))  # type: ignore[assignment]
    high = F.pad(x, (0, 0, reach, reach), mode="reflect")
    return sum(weight[:, k] * high[..., k : k + side, :] for k in range(2 * reach + 1))  # type: ignore[return-value]


def cells(output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of objectness (B, N) and classes (B, N, C), boxes (B, N, 4), middles of cells (N, 2)."""
    n = output.shape[-1]
    at = STRIDE * (torch.arange(n) + 0.5)
    middle = torch.stack([at.repeat(n), at.repeat_interleave(n)], dim=1)
    z = output.flatten(2).transpose(1, 2)
    ends = STRIDE * F.softplus(z[..., -4:])
    return z[..., 0], z[..., 1:-4], torch.cat([middle - ends[..., :2], middle + ends[..., 2:]], -1), middle


def decoded(output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (B, M, 4), labels, scores and objectness (B, M) of the teacher's output, suppressed, from LO on."""
    objectness, classes, boxes, _ = cells(output)
    objectness = objectness.sigmoid()
    best, label = classes.sigmoid().max(-1)
    score = objectness * best
    most = max(1, min(100, int((score >= LO).sum(1).max())))
    score, order = score.topk(most, dim=1)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).clamp(0, STRIDE * output.shape[-1])
    label, objectness = label.gather(1, order), objectness.gather(1, order)
    keep = score >= LO
    rival = (overlap(boxes[:, :, None], boxes[:, None]) > OVERLAP) & (label[:, :, None] == label[:, None])
    for i in range(most - 1):
        keep[:, i + 1 :] &= ~(keep[:, i : i + 1] & rival[:, i, i + 1 :])
    return boxes, label.masked_fill(~keep, -1), score, objectness


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union."""
    shared = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )
    return shared / (area(a) + area(b) - shared).clamp(min=1e-9)


def area(boxes: Tensor) -> Tensor:
    """Width times height."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@dataclass
class Cells:
    """Cells of an output that a box is near of: (n,) which image, cell and box; ``share``, that of an image's mean."""

    image: Tensor
    cell: Tensor
    box: Tensor

    @staticmethod
    def near(middle: Tensor, boxes: Tensor, labels: Tensor) -> Cells:
        """The nearest box of each cell within the radius."""
        far = ((boxes[:, :, None, :2] + boxes[:, :, None, 2:]) / 2 - middle).square().sum(-1)
        least, box = far.masked_fill(labels[:, :, None] < 0, math.inf).min(1)
        image, cell = (least <= RADIUS**2).nonzero(as_tuple=True)
        return Cells(image, cell, box[image, cell])

    def share(self, count: int, chosen: Tensor) -> Tensor:
        """By what each of ``chosen`` (n,) weighs in the mean over images of means over cells."""
        each = torch.bincount(self.image, chosen.float(), count).clamp(min=1)
        return chosen / each[self.image].float() / count


def server_loss(output: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Objectness, classes and 1 - GIoU, weighted .7, .3, 2."""
    objectness, classes, found, middle = cells(output)
    near = Cells.near(middle, boxes, labels)
    at = near.image, near.cell
    share = near.share(len(output), torch.ones_like(near.image))
    target = torch.zeros_like(objectness)
    target[at] = 1
    one_hot = F.one_hot(labels[near.image, near.box], classes.shape[-1]).float()
    of_class = F.binary_cross_entropy_with_logits(classes[at], one_hot, reduction="none").mean(-1)
    a, b = found[at], boxes[near.image, near.box]
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(-1)
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(-1)
    union = area(a) + area(b) - shared
    giou = shared / union - (hull - union) / hull
    whole = F.binary_cross_entropy_with_logits(objectness, target)
    return 0.7 * whole + (share * (0.3 * of_class + 2 * (1 - giou))).sum()


def client_loss(output: Tensor, boxes: Tensor, labels: Tensor, score: Tensor, sure: Tensor) -> Tensor:
    """Objectness on the teacher's, classes and 1 - CIoU of boxes that are routed there."""
    objectness, classes, found, middle = cells(output)
    near = Cells.near(middle, boxes, labels)
    at, of = (near.image, near.cell), (near.image, near.box)
    target = torch.zeros_like(objectness)
    target[at] = sure[of]
    high = score[of] >= HI
    one_hot = F.one_hot(labels[of], classes.shape[-1]).float()
    of_class = F.binary_cross_entropy_with_logits(classes[at], one_hot, reduction="none").mean(-1)
    place = high | (sure[of] > SURE)
    whole = F.binary_cross_entropy_with_logits(objectness, target)
    n = len(output)
    box = near.share(n, place) * (1 - ciou(found[at], boxes[of]))
    return 0.7 * whole + 0.3 * (near.share(n, high) * of_class).sum() + 2 * box.sum()


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU (n,)."""
    iou = overlap(a, b)
    wide = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    apart = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]).square().sum(-1) / 4
    slopes = [torch.atan((c[:, 2] - c[:, 0]) / (c[:, 3] - c[:, 1]).clamp(min=1e-9)) for c in (a, b)]
    v = 4 / math.pi**2 * (slopes[0] - slopes[1]).square()
    with torch.no_grad():
        alpha = v / (1 - iou + v).clamp(min=1e-9)
    return iou - apart / wide.square().sum(-1).clamp(min=1e-9) - alpha * v


def omega(theta: Tensor) -> Tensor:
    """How far a kernel is from orthogonal, on both sides; exact spectral norms."""
    m = theta.flatten(1)
    m = m if m.shape[0] <= m.shape[1] else m.T
    off = (torch.linalg.eigvalsh(m @ m.T) - 1).abs().max()
    return off + (off if m.shape[0] == m.shape[1] else off.clamp(min=1))
