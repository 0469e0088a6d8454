"""What stays the same over a run: the model's shape, the clients' sizes, the settings that a strategy may look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedsim.config.schema import ClientConfig
from fedsim.data.local import LocalData
from fedsim.data.shards import Shards
from fedsim.local.kinds import Kinds
from fedsim.sampling.exclusion import Roster
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.vectors import Weights

if TYPE_CHECKING:
    from fedsim.topology import Topology


@dataclass(frozen=True)
class Architecture:
    """A model that clients train: its task, the layout of its vectors, and what it starts from."""

    task: Task
    layout: Layout
    start: Weights


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a strategy may know of a run, from its first round to its last."""

    task: Task
    layout: Layout
    start: Weights  # initial model; ``initial`` gives a copy
    sizes: np.ndarray  # (m,) training samples of every registered client; with labels, where only some have
    local: ClientConfig
    seed: int
    dtype: torch.dtype
    share_buffers: bool = True  # whether BatchNorm statistics travel
    own_buffers: bool = False  # whether buffers are the server's: clients receive them and send none
    class_counts: np.ndarray | None = None  # (C,) training samples of all clients
    own_tests: Shards | None = None  # rows of the common test set that each client is measured on
    client_domains: Sequence[str | None] | None = None  # of every client; None without domains
    topology: Topology | None = None  # of peers that learn without a server
    fresh: Callable[[int], Weights] | None = None  # another initial model per peer
    kinds: Kinds | None = None  # of clients; None: all alike
    unlabelled: np.ndarray | None = None  # (m,) samples without labels; None where all have
    data: LocalData | None = None  # labelled samples of the server's own
    roster: Roster | None = None  # who is there; None: all who are registered
    newcomers: np.ndarray | None = None  # (m,) samples of the clients held out for good, 0 of others
    others: tuple[Architecture, ...] = ()  # that some clients train instead of the run's model

    @property
    def num_clients(self) -> int:
        """Clients that can take part: those registered, without the absent (``exclude``)."""
        return len(self.sizes) if self.roster is None else len(self.roster)

    @property
    def clients(self) -> Sequence[int]:
        """Their ids, ascending."""
        return range(len(self.sizes)) if self.roster is None else self.roster.present

    def architecture(self, number: int) -> Architecture:
        """The run's model for 0, and ``others`` from 1."""
        return self.others[number - 1] if number else Architecture(self.task, self.layout, self.start)

    def architecture_of(self, client: int) -> int:
        """Number of the model that ``client`` trains."""
        return self.kinds.architecture(client) if self.kinds and self.others else 0

    @property
    def trained(self) -> list[int]:
        """Numbers of the models that some client trains, ascending."""
        return sorted(set(self.kinds.architectures)) if self.kinds and self.others else [0]

    def by_architecture(self, clients: Sequence[int]) -> dict[int, list[int]]:
        """``clients`` by the number of the model that they train, ascending."""
        out: dict[int, list[int]] = {}
        for client in clients:
            out.setdefault(self.architecture_of(client), []).append(client)
        return dict(sorted(out.items()))

    def initial(self) -> Weights:
        """A copy of the initial model."""
        return Weights(self.start.w.clone(), self.start.buffers.clone())
