"""Attacks on what a client sends, from what it knows itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.attacks.base import Attack, check
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class RandomUpdate(Attack):
    """Noise instead of the update: ``scale`` times uniform on [0, 1), as in the flag experiments, or Gaussian."""

    distribution: str
    scale: float

    def __post_init__(self) -> None:
        check(
            self.distribution in ("uniform", "gaussian"),
            "distribution",
            self.distribution,
            "choose one of uniform, gaussian",
        )
        check(self.scale > 0, "scale", self.scale, "must be positive")

    def corrupt(self, job: Job, name: str, array: Tensor) -> Tensor:
        """Fresh draws for each client, round and array."""
        draw = torch.rand if self.distribution == "uniform" else torch.randn
        noise = draw(array.shape, generator=job.rng(f"attack/{name}"), dtype=array.dtype)
        return self.scale * noise.to(array.device)


@dataclass(frozen=True, kw_only=True)
class SignFlip(Attack):
    """``-scale`` times the own update."""

    scale: float

    def __post_init__(self) -> None:
        check(self.scale > 0, "scale", self.scale, "must be positive")

    def corrupt(self, job: Job, name: str, array: Tensor) -> Tensor:
        """Reverse it."""
        return -self.scale * array


@dataclass(frozen=True, kw_only=True)
class NonFiniteUpdate(Attack):
    """An update of NaN or infinite entries. The server leaves such clients out, or stops (``failures.nonfinite``)."""

    value: str | float

    def __post_init__(self) -> None:
        named = str(self.value) in ("nan", "inf", "-inf")
        check(named, "value", self.value, "choose one of nan, inf, -inf")

    def corrupt(self, job: Job, name: str, array: Tensor) -> Tensor:
        """Nothing but ``value``."""
        return torch.full_like(array, float(self.value))


@dataclass(frozen=True, kw_only=True)
class Drop(Attack):
    """A lossy link: each packet of ``packet`` successive numbers is lost with probability ``loss`` and read as zero.

    ``packet=1`` loses single entries, 350 what fits a packet of 1400 bytes; ``None`` the whole update or nothing.
    """

    loss: float
    packet: int | None

    def __post_init__(self) -> None:
        check(0 <= self.loss <= 1, "loss", self.loss, "a probability, in [0, 1]")
        check(self.packet is None or self.packet >= 1, "packet", self.packet, "at least 1, or null")

    def corrupt(self, job: Job, name: str, array: Tensor) -> Tensor:
        """Zeros where packets are lost."""
        if self.packet is None:
            return array
        count = -(-array.numel() // self.packet)
        lost = torch.rand(count, generator=job.rng(f"attack/{name}")) < self.loss
        gone = lost.repeat_interleave(self.packet)[: array.numel()].view(array.shape)
        return array.masked_fill(gone.to(array.device), 0)

    def after(self, job: Job, update: Update) -> Update:
        """The update with its losses; a lost one leaves the client out of the round."""
        if self.packet is None and float(torch.rand(1, generator=job.rng("attack"))) < self.loss:
            raise Refusal("its update was lost on the way (attack: drop)")
        return super().after(job, update)
