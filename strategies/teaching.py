"""What models that came say of samples, for those who learn from them: batch by batch, by all workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedsim.engine.workshop import Workshop
from fedsim.server.depot import Uploads
from fedsim.server.exchanges import Server
from fedsim.task.vectors import Weights
from strategies.ensembles import direction, ensemble, perturbed

ROWS = 1024  # of a batch times models from which gradients are computed in parts, each of less than twice as many


@dataclass(frozen=True)
class Teachers:
    """All models, as they are sent to workers."""

    hash: str
    models: Sequence[tuple[Weights, int]]  # and the number of each one's architecture

    def modules(self, shop: Workshop) -> Sequence[nn.Module]:
        """As modules that are frozen and in evaluation mode."""
        return shop.kept(f"teachers/{self.hash}", lambda: [shop.frozen(*m) for m in self.models])

    def logits(self, shop: Workshop, x: Any, spare: bool = False) -> Tensor:
        """``f`` (K, B, C) of a batch, one model after the other, with gradient to x. ``spare``: for it each model
        computes once more, and nothing but outputs is held till then."""
        if not spare:
            return torch.stack([shop.logits(module, x) for module in self.modules(shop)])
        again = partial(checkpoint, shop.logits, use_reentrant=False)
        return torch.stack([again(module, x) for module in self.modules(shop)])


class Lesson(NamedTuple):
    """A batch ``x`` (B, ...) that is to be moved by ``eps`` along the gradient of ``u . A_w``, and how."""

    x: Tensor
    w: Tensor  # (K,) of the ensemble
    u: Tensor | None = None  # (B, C) in [0, 1), of the direction; None: x stays where it is
    eps: float = 0.0
    kind: str = "sign"
    T: float = 1.0


def teachers(server: Server, uploads: Uploads) -> Teachers:
    """All models that came; the same object in every round."""
    models = [(m.weights, m.architecture) for m in uploads.models]
    return server.workshop.kept(f"sent/{uploads.hash}", lambda: Teachers(uploads.hash, models))


def outputs(server: Server, models: Teachers, items: Iterable[Any], *number: int) -> Iterator[Tensor]:
    """Logits (K, B, C) of all models on each of ``items``."""
    return map(torch.clone, server.spread(_outputs, models, items, "outputs", *number))


def taught(
    server: Server, models: Teachers, lessons: Iterable[Lesson], e: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each lesson ``x~``, and the ensemble's logits ``A_w(x~)`` (B, C)."""
    for x, a in server.spread(_taught, models, lessons, "taught", e):
        yield x.clone(), a.clone()  # not where another process wrote them: sums may depend on the place


def _outputs(shop: Workshop, models: Teachers, x: Any) -> Tensor:
    with torch.no_grad():
        return models.logits(shop, x)


def _taught(shop: Workshop, models: Teachers, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """In parts of the batch, so that the graph through many models stays small: samples do not depend on each other.
    None is of one sample, which some models cannot take."""
    count = max(1, len(lesson.x) // max(2, ROWS // len(models.models)))
    us = repeat(None) if lesson.u is None else torch.tensor_split(lesson.u, count)
    xs = torch.tensor_split(lesson.x, count)
    parts = [_taught_part(shop, models, lesson, *p) for p in zip(xs, us, strict=False)]
    return torch.cat([x for x, _ in parts]), torch.cat([a for _, a in parts])


def _taught_part(
    shop: Workshop, models: Teachers, lesson: Lesson, x: Tensor, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x.clone()
    if u is not None:
        x = x.requires_grad_()
        a = ensemble(models.logits(shop, x), lesson.w)
        g = direction(a, u.to(a) * 2 - 1, lesson.T, x)
        x = perturbed(x.detach(), g, lesson.eps, lesson.kind)
    with torch.no_grad():
        return x, ensemble(models.logits(shop, x), lesson.w)
