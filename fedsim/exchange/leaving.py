"""One update on its way out of a client: whose it is, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from fedsim.exchange.entries import shared_entries
from fedsim.exchange.normals import Draws
from fedsim.exchange.payload import WEIGHT, Payload, Value
from fedsim.rng import torch_rng

if TYPE_CHECKING:
    from fedsim.task.layout import Layout
    from fedsim.task.slots import Slots

Bounds = Mapping[str, float | None]  # of vectors, in the order in which they leave; None: as long as it is
OWN = "release/"  # begins names of the pipeline's own: client states, values of messages and updates


@dataclass(slots=True)
class Leaving:
    """Whose update leaves, and in which exchange."""

    seed: int
    round: int  # or the number that keys the client's draws
    client: int
    task: str
    layout: Layout
    values: Mapping[str, Value] = field(default_factory=dict)  # of the message
    kept: Mapping[str, Tensor] = field(default_factory=dict)  # what begins with ``OWN`` of its state
    stays: tuple[slice, ...] = ()  # spans of ``w`` that never leave it: nothing is drawn for them
    events: int = 0  # noisy gradients of single samples that the update is made of
    lengths: Mapping[str, float] = field(default_factory=dict)  # of vectors, where they are known already
    bounds: Bounds | None = None  # of the exchange, where they are known already
    spare: str = ""  # a vector that nobody reads afterwards

    def private(self, v: Tensor, slots: Slots | None) -> Tensor | None:
        """0 where entries of ``v``, without padding, never leave the client, else 1; None: all of them leave."""
        return shared_entries(self.layout, self.stays, v, slots)

    def draws(self, vector: str) -> Draws:
        """Generators keyed by (seed, ``release/<vector>/<stage>``, round, client); tasks but ``fit`` go before."""
        key = key_of(self.task, vector)
        return lambda stage: torch_rng(self.seed, f"{key}/{stage}", self.round, self.client)


@dataclass(slots=True)
class Released:
    """What became of an update. ``frames`` hold what travels, of vectors that do not travel as they are folded."""

    arrays: dict[str, Tensor]  # what is folded
    values: dict[str, Value] = field(default_factory=dict)  # further ones, for the server
    frames: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)  # the client's new residuals
    metrics: dict[str, float] = field(default_factory=dict)  # for the log

    def payload(self, values: Mapping[str, Value]) -> Payload:
        """All as it travels, of an update with these ``values``: no weight beside the one in fixed point."""
        shown = {**values, **self.values}
        if WEIGHT in self.arrays:
            shown.pop("weight", None)
        return Payload({**self.arrays, **self.frames}, shown)


def key_of(task: str, vector: str) -> str:
    """What keys a vector's draws begin with; tasks but ``fit`` go before."""
    return f"{'' if task == 'fit' else f'{task}/'}{OWN}{vector}"
