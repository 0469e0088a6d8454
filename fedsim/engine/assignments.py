"""What workers are given and give back: a run's plan, an exchange's broadcast, chunks of its cohort, their sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsim.config.schema import ClientConfig, FailureConfig
from fedsim.data.federated import FederatedData
from fedsim.data.views import View
from fedsim.exchange.downlink import bare_down, opened_down
from fedsim.exchange.fold import Folder
from fedsim.exchange.payload import Outcome, Payload
from fedsim.exchange.release import Release
from fedsim.local.interface import ClientLike
from fedsim.local.kinds import Kinds
from fedsim.task.layout import Layout
from fedsim.task.task import Task


@dataclass(frozen=True)
class Plan:
    """All that a worker must know, sent once."""

    task: Task
    client: ClientLike
    data: FederatedData
    local: ClientConfig
    failures: FailureConfig
    seed: int
    dtype: torch.dtype
    buffers: str
    threads: int = 1
    device: str = "cpu"
    vectorize: str = "auto"
    lanes: int = 0  # see ``fedsim.engine.lanes``
    tf32: bool = False
    kinds: Kinds | None = None  # of clients; None: all alike
    views: Mapping[str, View] = field(default_factory=dict)  # named augmentations, for ``job.view``
    hashes: bool = False  # whether outcomes say what was sent, by hashes
    release: Release | None = None  # what is done to updates before they leave; None: they leave as they are
    others: tuple[Task, ...] = ()  # of models 1, 2, ... that some clients train instead (``client.classes``)
    efforts: tuple[float, ...] = ()  # what each of these costs, as a share of the run's model
    effort: float = 1.0  # the same of this plan's own model
    sole: bool = False  # the task's model is nobody else's: the worker trains it, not a copy
    declared: bool = field(
        init=False
    )  # the client's class is ``vectorisable``; a class sent by value may forget it

    def __post_init__(self) -> None:
        object.__setattr__(self, "declared", self.client.vectorisable)

    def of(self, number: int) -> Plan:
        """The same work on the model ``number`` of ``others``, counted from 1."""
        other = replace(
            self, task=self.others[number - 1], effort=self.efforts[number - 1], others=(), efforts=()
        )
        object.__setattr__(other, "declared", self.declared)
        return other


@dataclass(frozen=True)
class Broadcast:
    """What all chunks of one exchange share; put into shared memory once."""

    round: int
    task: str  # name of the client's method
    payload: Payload
    fold: Mapping[str, tuple[str, ...]]
    standing: Payload | None = None  # what the clients hold already
    keep: bool = False  # they are to hold the payload from now on
    architecture: int = 0  # of the model that it is about: 0 the run's, others as ``Plan.others`` counts them

    def opened(self, plan: Plan, layout: Layout) -> Broadcast:
        """The message as clients use it."""
        if plan.release is None:
            return self
        about = (self.task, plan.seed, self.round, layout, plan.dtype)
        payload = opened_down(plan.release, self.payload, *about, self.standing)
        return self if payload is self.payload else replace(self, payload=payload)

    def to(self, device: str) -> Broadcast:
        """The same with its arrays on ``device``."""
        standing = None if self.standing is None else self.standing.to(device)
        return replace(self, payload=self.payload.to(device), standing=standing)


BY_ROW = {"by": "row"}  # a field of named arrays with a row per client of the chunk


@dataclass(frozen=True)
class Chunk:
    """A run of the cohort in client order, with per-client message parts and client states.

    Fields map client ids to what is theirs, unless they are marked ``BY_ROW``. ``rows`` holds arrays (c, ...) of which
    each client receives its row; ``turns`` the numbers that key the draws and the schedule of clients that do not go
    by the round.
    """

    clients: Sequence[int]
    each: Mapping[int, Payload] = field(default_factory=dict)
    states: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    steps: Mapping[int, int] = field(default_factory=dict)  # bounds on local steps, where time is short
    rows: Mapping[str, Tensor] = field(default_factory=dict, metadata=BY_ROW)
    turns: Mapping[int, int] = field(default_factory=dict)

    def part(self, client: int) -> Payload | None:
        """What ``client`` receives beyond the broadcast; its rows are views."""
        each = self.each.get(client)
        if not self.rows:
            return each
        at = self.clients.index(client)
        rows = {k: v[at] for k, v in self.rows.items()}
        return Payload(rows) if each is None else Payload({**rows, **each.arrays}, each.values)

    def opened(self) -> Chunk:
        """The parts as clients use them: what they catch up by is in the message as it was opened."""
        bare = {c: bare_down(part) for c, part in self.each.items()}
        return replace(self, each={c: p for c, p in bare.items() if p.arrays or p.values})

    def alone(self, client: int) -> Chunk:
        """The part of one client."""
        at = self.clients.index(client)
        own = {
            name: {client: part[client]} if client in (part := getattr(self, name)) else {}
            for name in ("each", "states", "steps", "turns")
        }
        return replace(self, clients=[client], rows={k: v[at : at + 1] for k, v in self.rows.items()}, **own)

    def to(self, device: str) -> Chunk:
        """The same with its arrays on ``device``."""
        return replace(
            self,
            rows={k: v.to(device) for k, v in self.rows.items()},
            each={c: p.to(device) for c, p in self.each.items()},
            states={c: {k: v.to(device) for k, v in s.items()} for c, s in self.states.items()},
        )


@dataclass
class ChunkResult:
    """Partial sums, a row per client, and the new client states."""

    folder: Folder
    outcomes: list[Outcome]
    states: dict[int, dict[str, Tensor]]
