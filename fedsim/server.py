"""The server's side of an exchange: messages out in chunks, sums back in chunk order, client states committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.clientstore import ClientStore
from fedsim.cohort import cut
from fedsim.config import ClientConfig, FailureConfig
from fedsim.engine.worker import Broadcast, Chunk, ChunkResult
from fedsim.errors import ClientError
from fedsim.evaluation import mean_of
from fedsim.fold import Fold, combine, fold_kinds
from fedsim.payload import Message, Outcome, Payload, Replies
from fedsim.task import Task
from fedsim.vectors import Layout, Weights
from fedsim.work import local_epochs, num_steps

if TYPE_CHECKING:
    from fedsim.engine.base import Engine
    from fedsim.topology import Topology

EVALUATION_GROUPS = 4  # parts per worker that the test set is dealt into


@dataclass(frozen=True)
class Round:
    """What a strategy may know about the round it is called for."""

    index: int  # from 0
    cohort: Sequence[int]  # client ids, ascending
    num_clients: int  # registered clients m
    seed: int
    local: ClientConfig

    @property
    def lr(self) -> float:
        """Local learning rate of this round."""
        return float(self.local.lr * self.local.lr_decay**self.index)

    def rng(self, purpose: str) -> torch.Generator:
        """A generator keyed by (seed, purpose, round), for draws at the server."""
        return rng.torch_rng(self.seed, f"server/{purpose}", self.index)

    def numpy_rng(self, purpose: str) -> np.random.Generator:
        """The same as a NumPy generator."""
        return rng.numpy_rng(self.seed, f"server/{purpose}", self.index)


@dataclass
class Server:
    """What a strategy works with: the model's layout, the clients behind an engine, evaluation, and the log."""

    engine: Engine
    task: Task
    layout: Layout
    start: Weights  # initial model
    sizes: np.ndarray  # (m,) training samples per client
    local: ClientConfig
    failures: FailureConfig
    states: ClientStore
    seed: int
    dtype: torch.dtype
    chunks: int = 0
    share_buffers: bool = True
    test_size: int = 0
    eval_batch: int = 512
    topology: Topology | None = None  # of peers that learn without a server
    fresh: Callable[[int], Weights] | None = None  # another initial model per peer
    current: Round | None = None
    log: dict[str, float] = field(default_factory=dict)  # extra numbers for the round's row
    facts: dict[str, Any] = field(default_factory=dict)  # about the run, for its summary
    outcomes: list[Outcome] = field(default_factory=list)  # of the current round, all exchanges

    @property
    def num_clients(self) -> int:
        """Registered clients m."""
        return len(self.sizes)

    def initial(self) -> Weights:
        """A copy of the initial model."""
        return Weights(self.start.w.clone(), self.start.buffers.clone())

    @property
    def round(self) -> Round:
        """The round that is under way."""
        if self.current is None:
            raise ClientError(
                "there is no round under way: exchanges belong inside Strategy.round or evaluate"
            )
        return self.current

    def exchange(
        self,
        message: Message,
        fold: Fold,
        *,
        task: str = "fit",
        clients: Sequence[int] | None = None,
        turns: Mapping[int, int] | None = None,
    ) -> Replies:
        """Send ``message`` to ``clients`` (the round's cohort), run their method ``task``, fold the updates.

        Clients that refuse, fail or send non-finite values are left out and named in the outcomes; the failure policy
        may stop the run. New client states are committed for accepted updates only. ``turns`` are numbers that key the
        draws and the learning rate of clients instead of the round: how often each has trained, where rounds mean
        nothing to them.
        """
        cohort = sorted(self.round.cohort if clients is None else clients)
        kinds = fold_kinds(fold)
        rows = self._rows(message, len(cohort), task, kinds)
        shared = message.shared
        if "buffers" in shared.arrays:
            if self.share_buffers and task == "fit":
                kinds["buffers"] = ("mean",)
            elif not self.share_buffers:
                shared = Payload({k: v for k, v in shared.arrays.items() if k != "buffers"}, shared.values)
        work = [self._work(c) for c in cohort]
        chunks, costs = [], []
        for span in cut(work, self.chunks, self.layout.dim):
            ids = cohort[span]
            each = {c: message.each[c] for c in ids if c in message.each}
            states = {c: s for c in ids if (s := self.states.get(c))}
            due = {c: turns[c] for c in ids} if turns is not None else {}
            chunks.append(Chunk(ids, each, states, {k: v[span] for k, v in rows.items()}, due))
            costs.append(sum(work[span]))
        broadcast = Broadcast(self.round.index, task, shared, kinds)
        outcomes: list[Outcome] = []

        def accepted() -> object:
            result: ChunkResult
            for result in self.engine.map("run", broadcast, chunks, costs):
                outcomes.extend(result.outcomes)
                self._apply_policy(result.outcomes)
                for client, state in result.states.items():
                    self.states.propose(client, broadcast.round, state)
                yield result.folder

        folded = combine(accepted(), len(cohort))  # type: ignore[arg-type]
        for o in outcomes:
            o.task = task
        self.outcomes.extend(outcomes)
        return Replies(outcomes, folded)

    def evaluate(self, weights: Weights) -> dict[str, float]:
        """Loss and metrics of ``weights`` on the common test set; the same for any number of workers."""
        if not self.test_size:
            return {}
        edges = list(range(0, self.test_size, self.eval_batch)) + [self.test_size]
        rows = list(zip(edges, edges[1:], strict=False))
        parts = max(1, min(len(rows), EVALUATION_GROUPS * self.engine.workers))
        groups = [rows[i * len(rows) // parts : (i + 1) * len(rows) // parts] for i in range(parts)]
        payload = Payload(weights._asdict())
        return mean_of([s for part in self.engine.map("evaluate", payload, groups) for s in part])

    def evaluate_clients(self, weights: Weights, clients: Sequence[int]) -> Replies:
        """Measure ``weights`` on the held-out samples of ``clients`` (with what each of them keeps)."""
        arrays: Mapping[str, Tensor] = weights._asdict()
        return self.exchange(Message(Payload(arrays)), {}, task="evaluate", clients=clients)

    def _rows(
        self, message: Message, count: int, task: str, kinds: dict[str, tuple[str, ...]]
    ) -> dict[str, Tensor]:
        """The message's rows, and, where each client receives statistics of its own, a stack of those it returns."""
        rows = dict(message.rows)
        for name, array in rows.items():
            if len(array) != count:
                raise ClientError(
                    f"message rows '{name}' hold {len(array)} rows; expected {count}, one per client asked"
                )
        if "buffers" in rows and not self.share_buffers:
            del rows["buffers"]
        elif "buffers" in rows and task == "fit":
            kinds["buffers"] = ("stack",)
        return rows

    def _work(self, client: int) -> float:
        epochs = local_epochs(self.local, self.seed, self.round.index, client)
        return 1.0 + num_steps(self.local, int(self.sizes[client]), epochs) * self.local.batch_size

    def _apply_policy(self, outcomes: Sequence[Outcome]) -> None:
        for o in outcomes:
            stop = (o.kind == "failed" and self.failures.policy == "stop") or (
                o.kind == "nonfinite" and self.failures.nonfinite == "stop"
            )
            if stop:
                key = "policy" if o.kind == "failed" else "nonfinite"
                raise ClientError(
                    f"client {o.client} {o.kind} in round {self.round.index + 1}: {o.reason.strip()}\n"
                    f"(failures.{key}=skip goes on without such clients)"
                )
