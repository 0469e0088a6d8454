"""The work itself: one chunk of clients, folded in client order. Every engine runs exactly this code."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedsim.config.schema import ClientConfig, FailureConfig
from fedsim.data.federated import FederatedData
from fedsim.data.local import LocalData
from fedsim.engine import vectorised
from fedsim.errors import ClientError
from fedsim.exchange.fold import Folder
from fedsim.exchange.packing import sent_bytes
from fedsim.exchange.payload import NonFinite, Outcome, Payload, Refusal, Update
from fedsim.local.job import ClientLike, Job
from fedsim.local.kept import LocalPart
from fedsim.local.kinds import Classes
from fedsim.rng import key
from fedsim.task.evaluation import evaluate, features
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel, finite


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
    classes: Classes | None = None  # kinds of clients; None: all alike


@dataclass(frozen=True)
class Broadcast:
    """What all chunks of one exchange share; put into shared memory once."""

    round: int
    task: str  # name of the client's method
    payload: Payload
    fold: Mapping[str, tuple[str, ...]]
    standing: Payload | None = None  # what the clients hold already
    keep: bool = False  # they are to hold the payload from now on


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
        """What ``client`` receives beside the broadcast; its rows are views."""
        each = self.each.get(client)
        if not self.rows:
            return each
        at = self.clients.index(client)
        rows = {k: v[at] for k, v in self.rows.items()}
        return Payload(rows) if each is None else Payload({**rows, **each.arrays}, each.values)


@dataclass
class ChunkResult:
    """Partial sums, a row per client, and the new client states."""

    folder: Folder
    outcomes: list[Outcome]
    states: dict[int, dict[str, Tensor]]


class _WrittenError(ClientError):
    """A client changed what it was only lent."""


class Worker:
    """One resident model that serves one client after the other."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.model = FlatModel(copy.deepcopy(plan.task.model), plan.dtype, plan.device)
        self.model.module.train()
        self.model.autocast = torch.bfloat16 if plan.local.autocast else None
        keeps = getattr(plan.client, "keeps", None)
        self.part = LocalPart.of(plan.buffers, self.model.layout, keeps(self.model.layout) if keeps else ())
        self.data = plan.data.to(plan.device)
        self._vectorize = vectorised.wanted(plan.vectorize, plan.device)
        plan.client.setup(plan.task, self.model.layout)

    def run(self, broadcast: Broadcast, chunk: Chunk, folder: Folder | None = None) -> ChunkResult:
        """Run the clients of ``chunk`` and fold their updates in client order (into ``folder``, if given)."""
        if self.plan.device != "cpu":
            broadcast, chunk = _to(broadcast, chunk, self.plan.device)
        folder, outcomes = folder or Folder(broadcast.fold), list[Outcome]()
        states: dict[int, dict[str, Tensor]] = {}
        layout = self.model.layout
        down = sent_bytes(broadcast.payload, layout)
        with torch.random.fork_rng(devices=[]):
            ready = self._train_together(broadcast, chunk)
            for client in chunk.clients:
                each = chunk.part(client)
                outcome = Outcome(client, "ok", bytes_down=down + (sent_bytes(each, layout) if each else 0))
                state = self._one(broadcast, chunk, outcome, folder, ready.get(client))
                outcomes.append(outcome)
                if state is not None:
                    states[client] = {k: v.cpu() for k, v in state.items()}
        return ChunkResult(folder.cpu(), outcomes, states)

    def evaluate(self, weights: Payload, rows: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Sums of loss and metrics on test rows ``[start, stop)``, one dict per range."""
        data, w = self._test(weights)
        return evaluate(self.model, w, data, self.plan.task, [torch.arange(a, b) for a, b in rows])

    def features(self, weights: Payload, rows: Sequence[tuple[int, int]]) -> list[Tensor]:
        """``model.features`` of test rows ``[start, stop)``, one (stop - start, d) tensor per range."""
        data, w = self._test(weights)
        batches = [data.read(torch.arange(a, b)) for a, b in rows]
        return [x.cpu() for x in features(self.model, w, batches)]

    def _test(self, weights: Payload) -> tuple[LocalData, Tensor]:
        data = self.data.test_data(self.plan.dtype)
        assert data is not None
        return data, self.model.load(weights.arrays["w"].to(self.plan.device), weights.arrays.get("buffers"))

    def job(self, broadcast: Broadcast, chunk: Chunk, client: int) -> Job:
        """Build the job of one client."""
        plan, message, each = self.plan, broadcast.payload, chunk.part(client)
        turn = chunk.turns.get(client, broadcast.round)
        if (standing := broadcast.standing) is not None:
            message = Payload({**standing.arrays, **message.arrays}, {**standing.values, **message.values})
        if each is not None:
            message = Payload({**message.arrays, **each.arrays}, {**message.values, **each.values})
        return Job(
            client=client,
            round=turn,
            task=plan.task,
            model=self.model,
            local=plan.classes.local(client) if plan.classes else plan.local,
            seed=plan.seed,
            message=message,
            state=chunk.states.get(client) or self._fresh,
            source=self.data,
            purpose=broadcast.task,
            local_part=self.part,
            most_steps=chunk.steps.get(client),
        )

    def _one(
        self,
        broadcast: Broadcast,
        chunk: Chunk,
        outcome: Outcome,
        folder: Folder,
        ready: tuple[Job, Update] | None = None,
    ) -> dict[str, Tensor] | None:
        """Serve one client and fill in its ``outcome``; its new state, if it has one."""
        client, start = outcome.client, time.perf_counter()
        state: dict[str, Tensor] | None = None
        for attempt in range(self.plan.failures.retries + 1):
            job = ready[0] if ready else self.job(broadcast, chunk, client)
            try:
                update = ready[1] if ready else self._call(job, broadcast.task)
                state = self._fold_one(job, update, broadcast, folder, outcome)
            except _WrittenError:
                raise  # whatever the policy: other clients share what was written to
            except NonFinite as found:
                outcome.kind, outcome.reason = "nonfinite", str(found)
            except Refusal as refusal:
                outcome.kind, outcome.reason = "refused", str(refusal)
            except Exception:
                outcome.kind, outcome.reason = "failed", traceback.format_exc()
                if attempt < self.plan.failures.retries:
                    continue
            else:
                outcome.samples = job.samples
                if attempt:
                    outcome.metrics = {**outcome.metrics, "retries": float(attempt)}
            break
        outcome.gradients, outcome.forwards = job.gradients, job.forwards
        outcome.seconds = time.perf_counter() - start
        return state

    def _train_together(self, broadcast: Broadcast, chunk: Chunk) -> dict[int, tuple[Job, Update]]:
        """Updates of clients trained vectorised; none where that is off, impossible or failed (then one by one)."""
        wish = self.plan.vectorize
        if self._vectorize and vectorised.possible(self, broadcast, chunk):
            try:
                return vectorised.train(self, broadcast, chunk)
            except Exception as e:  # the loop over clients that follows names the client, if one is to blame
                warnings.warn(
                    f"not vectorised ({e}); clients {list(chunk.clients)} run one by one", stacklevel=2
                )
                self._vectorize = wish == "on"
        return {}

    def _fold_one(
        self, job: Job, update: Update, broadcast: Broadcast, folder: Folder, outcome: Outcome
    ) -> dict[str, Tensor] | None:
        arrays: dict[str, Any] = dict(update.arrays)
        if "buffers" in broadcast.fold:
            arrays["buffers"] = self.model.buffers
        payload = Payload.of(arrays, {**update.values, "weight": float(update.weight)})
        folder.check(payload.arrays)
        outcome.kind, outcome.reason = "ok", ""
        outcome.weight, outcome.values, outcome.metrics = (
            float(update.weight),
            payload.values,
            dict(update.metrics),
        )
        outcome.bytes_up = sent_bytes(payload, self.model.layout)
        bad = [k for k, t in payload.arrays.items() if not finite(t)]
        bad += [f"its state '{k}'" for k, t in (update.state or {}).items() if not finite(t)]
        if bad or not 0 <= update.weight < float("inf"):
            outcome.kind = "nonfinite"
            outcome.reason = (
                f"non-finite values in {', '.join(bad) or 'the weight'}; a smaller client.lr may help"
            )
            return None
        folder.add(payload.arrays, float(update.weight))
        if update.state is None and not job.kept:
            return None
        new = {**(job.state if update.state is None else update.state), **(job.kept or {})}
        return {k: v.detach().clone() for k, v in new.items()}  # the next client overwrites resident vectors

    @cached_property
    def _fresh(self) -> dict[str, Tensor]:
        """State of clients that never took part; one for all, since nobody may write to it."""
        fresh = self.plan.client.init_state(self.model.layout)
        device, dtype = self.plan.device, self.plan.dtype
        return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in fresh.items()}

    def _seed_layers(self, seed: int) -> None:
        """Seed what layers draw from. ``torch.manual_seed`` would do, but formats a stack trace on each call."""
        torch.default_generator.manual_seed(seed)
        if self.plan.device != "cpu":
            torch.cuda.manual_seed(seed)

    def _call(self, job: Job, task: str) -> Update:
        method = getattr(self.plan.client, task, None)
        if not callable(method):
            raise ClientError(
                f"the exchange asks for '{task}', but {type(self.plan.client).__name__} has no such method"
            )
        lent = [("message", k, t, t._version) for k, t in job.message.arrays.items()]
        lent += [("state", k, t, t._version) for k, t in job.state.items()]
        self._seed_layers(key(job.seed, f"{job.purpose}/layers", job.round, job.client) >> 1)
        try:
            if (prepare := getattr(self.plan.client, "prepare", None)) is not None:
                prepare(job)
            update = method(job)
        finally:
            for kind, name, tensor, version in lent:
                if tensor._version != version:
                    raise _WrittenError(
                        f"client {job.client} in round {job.round + 1}: its {kind} is read-only, but '{name}' was "
                        "written to; work on a .clone(), and return new state in Update.state"
                    )
        if not isinstance(update, Update):
            raise ClientError(
                f"{type(self.plan.client).__name__}.{task} returned {type(update).__name__}, not an Update"
            )
        if job.part_is_missing(update):
            raise ClientError(
                "where weights stay with clients, the update's delta must come from job.delta(w)"
            )
        return update


def _to(broadcast: Broadcast, chunk: Chunk, device: str) -> tuple[Broadcast, Chunk]:
    each = {c: p.to(device) for c, p in chunk.each.items()}
    states = {c: {k: v.to(device) for k, v in s.items()} for c, s in chunk.states.items()}
    payload, standing = broadcast.payload.to(device), broadcast.standing and broadcast.standing.to(device)
    chunk = replace(chunk, rows={k: v.to(device) for k, v in chunk.rows.items()}, each=each, states=states)
    return replace(broadcast, payload=payload, standing=standing), chunk
