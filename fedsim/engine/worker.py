"""The work itself: one chunk of clients, folded in client order. Every engine runs exactly this code."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsim.data.door import remedy
from fedsim.data.federated import FederatedData
from fedsim.data.local import Batch, LocalData
from fedsim.engine import lanes, vectorised
from fedsim.engine.accepting import KnownBounds, State, leaving, new_state, not_finite, resident_alone
from fedsim.engine.assignments import Broadcast, Chunk, ChunkResult, Plan
from fedsim.engine.lanes import Ahead, Begun, Lane
from fedsim.engine.resident import ReadOnlyError, Resident
from fedsim.engine.watch import KeptError
from fedsim.engine.workshop import Computation, Workshop
from fedsim.exchange.downlink import part_bytes
from fedsim.exchange.fold import Folder
from fedsim.exchange.packing import hashes_of, sent_bytes
from fedsim.exchange.payload import WEIGHT, NonFinite, Outcome, Payload, Refusal, Update
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.release import Leaving, Release
from fedsim.local.answer import check_shape
from fedsim.local.job import Job
from fedsim.task.captured import exact
from fedsim.task.evaluation import evaluate, features, logits

Span = tuple[int, int]  # test rows [start, stop)
TERMINATED = 143  # how a process leaves that is asked to end by SIGTERM
LEAKS = (ReadOnlyError, KeptError)  # whatever the failure policy: other clients are touched


class Worker:
    """One resident model that serves one client after the other."""

    def __init__(self, plan: Plan, data: FederatedData | None = None):
        """``data``: those of ``plan``, on its device already."""
        self.plan, self._resident = plan, Resident(plan, data)
        self._others = dict[int, Worker]()  # of models of other architectures
        self.model, self.data = self._resident.model, self._resident.data
        self._together = vectorised.wanted(plan, self.model) and vectorised.obstacle(plan, self.model) is None
        self._lanes: list[Lane] = []
        self._most = lanes.number(plan, self.model)
        self._moved: tuple[Broadcast, Broadcast] | None = None  # the last one, and the same on the device
        self._numbers = nullcontext if plan.device == "cpu" else partial(exact, plan.tf32)
        self._bounds = KnownBounds()
        self._warned: set[str] = set()
        self._shop: Workshop | None = None
        self.serving: Sequence[int] | None = None  # whose code runs; None: nobody's, the model is measured

    @property
    def privacy(self) -> Privacy | None:
        """What covers the updates that leave, if anything does."""
        return None if self.plan.release is None else self.plan.release.privacy

    def run(self, broadcast: Broadcast, chunk: Chunk, folder: Folder | None = None) -> ChunkResult:
        """Run the clients of ``chunk`` and fold their updates in client order (into ``folder``, if given)."""
        if broadcast.architecture:
            self.serving, other = chunk.clients, self._other(broadcast.architecture)
            found = other.run(replace(broadcast, architecture=0), chunk, folder)
            self.serving = None
            return found
        with self._numbers():
            return self._run(broadcast, chunk, folder or Folder(broadcast.fold))

    def _run(self, broadcast: Broadcast, chunk: Chunk, folder: Folder) -> ChunkResult:
        if self.plan.device != "cpu":
            broadcast, chunk = self._there(broadcast), chunk.to(self.plan.device)
        outcomes, states = list[Outcome](), dict[int, State]()
        layout = self.model.layout
        down = sent_bytes(broadcast.payload, layout)
        shared = hashes_of(broadcast.payload, layout, "message/") if self.plan.hashes else None
        standing, sent = broadcast.standing, chunk
        broadcast, chunk = broadcast.opened(self.plan, layout), chunk.opened()
        self.serving = chunk.clients
        done = self._begun(broadcast, chunk)
        for client in chunk.clients:
            self.serving, each = (client,), sent.part(client)
            outcome = Outcome(client, "ok", bytes_down=down + part_bytes(each, standing, layout))
            if shared is not None:
                outcome.hashes = shared | (hashes_of(each, layout, "message/") if each else {})
            state = self._serve(broadcast, chunk, outcome, folder, done.get(client))
            outcomes.append(outcome)
            if state is not None:
                states[client] = {k: v.cpu() for k, v in state.items()}
        self.serving = None
        return ChunkResult(folder.cpu(), outcomes, states)

    def try_out(self, on: FederatedData, broadcast: Broadcast, chunk: Chunk, folder: Folder) -> ChunkResult:
        """What ``run`` gives of other data, which lie on the worker's device; nothing of it stays."""
        own, self._resident.data = self._resident.data, on
        try:
            return self.run(broadcast, chunk, folder)
        finally:
            self._resident.data = own

    def evaluate(self, weights: Payload, rows: Sequence[Span]) -> list[dict[str, Any]]:
        """Sums of loss and metrics on test rows ``[start, stop)``, one dict per range."""
        data, w = self._test(weights)
        with self._numbers():
            return evaluate(self.model, w, data, self.plan.task, self._each(rows))

    def features(self, weights: Payload, rows: Sequence[Span]) -> list[Tensor]:
        """``model.features`` of test rows ``[start, stop)``, one (stop - start, d) tensor per range."""
        data, w = self._test(weights)
        batches: Iterator[Batch] = map(data.read, self._each(rows))
        with self._numbers():
            return [x.cpu() for x in features(self.model, w, batches)]

    def logits(self, weights: Payload, rows: Sequence[Span]) -> list[Tensor]:
        """Logits of test rows ``[start, stop)``, one (stop - start, C) tensor per range, of the model whose number
        ``weights`` may say (``architecture``)."""
        if number := int(weights.values.get("architecture", 0)):  # type: ignore[arg-type]
            values = {k: v for k, v in weights.values.items() if k != "architecture"}
            return self._other(number).logits(Payload(weights.arrays, values), rows)
        data, w = self._test(weights)
        with self._numbers():
            return logits(self.model, w, map(data.read, self._each(rows)), self.plan.task)

    def compute(self, asked: Computation, item: tuple[int, Any]) -> Any:
        """A part of the server's own work."""
        self._shop = self._shop or Workshop(self.plan, self.data.dataset)
        return asked.of(self._shop, item)

    def _other(self, number: int) -> Worker:
        """Who does the same on the model ``number`` of the plan's others; made when it is first needed."""
        if number not in self._others:
            self._others[number] = self.of_other(self.plan.of(number))
        return self._others[number]

    def of_other(self, plan: Plan) -> Worker:
        """A worker of the same kind, of another model on the same samples."""
        return Worker(plan, self.data)

    def _each(self, rows: Sequence[Span]) -> Iterator[Tensor]:
        """The rows of each range in turn; what is drawn while it is measured hangs on nothing but the range."""
        for start, stop in rows:
            self._resident.seed("evaluation", start)
            yield torch.arange(start, stop)

    def _test(self, weights: Payload) -> tuple[LocalData, Tensor]:
        data = self.data.test_data(self.plan.dtype, str(weights.values.get("on", "")))
        assert data is not None
        return data, self.model.load(weights.arrays["w"].to(self.plan.device), weights.arrays.get("buffers"))

    def _there(self, broadcast: Broadcast) -> Broadcast:
        """``broadcast`` on the GPU, moved once for all chunks of an exchange."""
        if self._moved is None or self._moved[0] is not broadcast:
            self._moved = broadcast, broadcast.to(self.plan.device)
        return self._moved[1]

    def _begun(self, broadcast: Broadcast, chunk: Chunk) -> Mapping[int, vectorised.Trained] | Ahead:
        """What there is of clients that are computed at once, or several at a time on lanes."""
        found = self._train_together(broadcast, chunk)
        wanted = min(self._most, len(chunk.clients))
        if found or wanted < 2:
            return found
        while len(self._lanes) < wanted:
            self._lanes.append(Lane(self.plan, self._resident))
        return Ahead(self._lanes[:wanted], self._resident, broadcast, chunk)

    def _train_together(self, broadcast: Broadcast, chunk: Chunk) -> dict[int, vectorised.Trained]:
        """Updates of clients trained vectorised; none where that is off or impossible, or failed for this chunk.

        Whether a chunk is vectorised depends on nothing but the chunk: other chunks' failures leave no trace.
        """
        if not self._together or not vectorised.possible(broadcast, chunk):
            return {}
        try:
            return vectorised.train(self._resident, broadcast, chunk)
        except LEAKS:
            raise
        except Exception as e:  # the loop over clients that follows names the client, if one is to blame
            if (reason := f"{type(e).__name__}: {e}") not in self._warned:
                self._warned.add(reason)
                warnings.warn(
                    f"clients {list(chunk.clients)} in round {broadcast.round + 1} run one by one, since vectorised "
                    f"training failed ({reason}); engine.vectorize=off does not try it",
                    stacklevel=2,
                )
            return {}

    def _serve(
        self,
        broadcast: Broadcast,
        chunk: Chunk,
        outcome: Outcome,
        folder: Folder,
        done: vectorised.Trained | Begun | None,
    ) -> State | None:
        """Serve one client and fill in its ``outcome``; its new state, if it has one.

        What was trained vectorised is the first attempt; a retry computes the client again, alone.
        """
        client, start = outcome.client, time.perf_counter() - (done.spent if isinstance(done, Begun) else 0)
        state: State | None = None
        for attempt in range(self.plan.failures.retries + 1):
            together = done if attempt == 0 else None
            job = together.job if together else self._resident.job(broadcast, chunk, client)
            try:
                update = together.update if together else self._resident.call(job, broadcast.task)
                state = self._accept(job, update, broadcast, folder, outcome)
            except (*LEAKS, KeyboardInterrupt):
                raise
            except NonFinite as found:
                outcome.kind, outcome.reason = "nonfinite", str(found)
            except Refusal as refusal:
                outcome.kind, outcome.reason = "refused", str(refusal)
            except BaseException as e:  # sys.exit() too: it ends neither the run nor a worker
                if isinstance(e, SystemExit) and e.code == TERMINATED:
                    raise
                outcome.kind, outcome.reason = "failed", traceback.format_exc()
                outcome.error = e if self.plan.failures.policy == "stop" else None
                continue
            else:
                outcome.samples = job.meter.samples
                if attempt:
                    outcome.metrics = {**outcome.metrics, "retries": float(attempt)}
            break
        outcome.gradients, outcome.forwards = job.meter.gradients, job.meter.forwards
        outcome.seconds = time.perf_counter() - start
        return state

    def sent(self, update: Update, job: Job, broadcast: Broadcast) -> Payload:
        """What travels of an update, with the statistics that the method averages."""
        payload = update.payload
        if "buffers" in broadcast.fold:
            payload = Payload({**payload.arrays, "buffers": job.model.buffers}, payload.values)
        return payload

    def leaves(self, travels: Payload, outcome: Outcome) -> None:
        """Count, and hash where that is asked for, what travels of an update in the end."""
        outcome.bytes_up = sent_bytes(travels, self.model.layout, self.model.pads_with_zeros)
        if outcome.hashes is not None:
            outcome.hashes |= hashes_of(travels, self.model.layout, "update/")

    def _accept(
        self, job: Job, update: Update, broadcast: Broadcast, folder: Folder, outcome: Outcome
    ) -> State | None:
        """Fold an update, unless it is not finite, and fill in the ``outcome``; the client's new state."""
        payload, release = self.sent(update, job, broadcast), self.plan.release
        arrays = {**payload.arrays, **{k: v for k, v in update.implied.items() if k in broadcast.fold}}
        if release is None:
            folder.check(arrays)
        if "delta" in payload.arrays and "w" in job.message.arrays:
            check_shape("delta", payload.arrays["delta"], job.message.arrays["w"])
        outcome.kind, outcome.reason, outcome.error, outcome.weight = "ok", "", None, float(update.weight)
        outcome.values, outcome.metrics = payload.values, dict(update.metrics)
        outcome.guesses, about = update.guesses, None
        if release is not None:
            about = leaving(job, self.model.layout, payload, self._bounds.of(release, broadcast, job.message))
        bad = not_finite(payload, update, {} if about is None else about.lengths)
        if bad is not None or release is None:
            self.leaves(payload, outcome)
        if bad is not None:
            outcome.kind = "nonfinite"
            outcome.reason = f"non-finite values in {bad}; {remedy(job.data, job.meter.first_loss)}"
            return None
        if release is not None and about is not None:
            return self._released(release, job, update, payload, about, broadcast, folder, outcome)
        folder.add(arrays, float(update.weight))
        return new_state(job, update)

    def _released(
        self,
        release: Release,
        job: Job,
        update: Update,
        payload: Payload,
        about: Leaving,
        broadcast: Broadcast,
        folder: Folder,
        outcome: Outcome,
    ) -> State | None:
        """Fold what the release makes of an update that is finite; the client's new state, residuals in it."""
        if alone := resident_alone(job, update, payload):
            about.spare = "delta"
        sent = release.leave(payload.arrays, payload.values, broadcast.fold, about)
        folder.check(sent.arrays)
        folder.frames(sent.frames)
        travels = sent.payload(payload.values)
        outcome.values, outcome.metrics = travels.values, {**outcome.metrics, **sent.metrics}
        if alone:
            job.model.scaled()
        self.leaves(travels, outcome)
        folder.add(sent.arrays, float(update.weight))
        outcome.weight = 1.0 if WEIGHT in sent.arrays else outcome.weight
        return new_state(job, update, sent.state)
