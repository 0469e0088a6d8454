"""The parts of a detector: its backbone, which can be trained and sent by itself, and all else, neck and head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedsim.local.groups import matching
from fedsim.task.fixed import BATCH_NORM
from fedsim.task.layout import Layout


@dataclass(frozen=True)
class DetectorParts:
    """The parts of a detector: ``patterns`` of the names of its backbone's parameters; all others are neck and head."""

    patterns: tuple[str, ...]

    def backbone(self, layout: Layout) -> frozenset[str]:
        """Names of the backbone's parameters.

        Raises:
            ConfigError: if there are none.
        """
        return frozenset(matching(self.patterns, [s.name for s in layout.params], "strategy.backbone"))

    def has(self, name: str) -> bool:
        """Whether a tensor of this name, parameter or buffer, is the backbone's."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def matrices(self, layout: Layout) -> list[str]:
        """Names of the weight matrices and kernels outside the backbone, without those of normalisation layers."""
        return [
            s.name
            for s in layout.params
            if len(s.shape) > 1 and s.name not in layout.norm and not self.has(s.name)
        ]

    @contextmanager
    def alone(self, module: nn.Module) -> Iterator[None]:
        """In this block only the backbone gets gradients, and BatchNorm outside it is in evaluation mode."""
        fixed = [n for n, p in module.named_parameters() if p.requires_grad and not self.has(n)]
        owners = [(module.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in fixed]
        whole = [owner._parameters[name] for owner, name in owners]
        norms = [
            m
            for n, m in module.named_modules()
            if isinstance(m, BATCH_NORM) and m.training and not self.has(f"{n}.weight")
        ]
        for m in norms:
            m.training = False
        for (owner, name), p in zip(owners, whole, strict=True):
            owner._parameters[name] = p.detach()  # type: ignore[union-attr,assignment]
        try:
            yield
        finally:
            for (owner, name), p in zip(owners, whole, strict=True):
                owner._parameters[name] = p
            for m in norms:
                m.training = True

    def cut(self, v: Tensor, layout: Layout) -> Tensor:
        """The backbone's entries (n,) of ``v`` (d,), without padding, in layout order."""
        return torch.cat([v[s.span] for s in layout.params if self.has(s.name)])

    def put(self, v: Tensor, part: Tensor, layout: Layout) -> Tensor:
        """``v`` (d,), in place, with ``part`` (n,) added to the backbone's entries: ``cut`` backwards."""
        start = 0
        for slot in layout.params:
            if self.has(slot.name):
                v[slot.span] += part[start : start + slot.numel]
                start += slot.numel
        return v
