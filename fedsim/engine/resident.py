"""What stays in a worker from client to client, the jobs that are made of it, and how a client's code is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from fedsim.data.dataset import Samples
from fedsim.data.federated import FederatedData
from fedsim.data.trees import leaves
from fedsim.engine.assignments import Broadcast, Chunk, Plan
from fedsim.engine.draws import may_draw
from fedsim.engine.elsewhere import Elsewhere
from fedsim.engine.watch import Watch
from fedsim.errors import ClientError, returned
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.payload import Payload, Update
from fedsim.exchange.release import OWN
from fedsim.local.answer import as_update, bits_of
from fedsim.local.job import Job
from fedsim.local.kept import LocalPart
from fedsim.local.newcomer import HELD_OUT, held_out
from fedsim.rng import key, seed_others
from fedsim.task.captured import CapturedModel
from fedsim.task.copies import copied
from fedsim.task.gradients import halve
from fedsim.task.outside import users
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel


class ReadOnlyError(ClientError):
    """A client wrote to its message or state, which are read-only: others share that memory."""


class Resident:
    """One model and the data, both on the worker's device, and the method's client, set up."""

    def __init__(self, plan: Plan, data: FederatedData | None = None):
        """``data``: those of ``plan``, on its device already."""
        self.plan, self.client = plan, plan.client
        task = plan.task
        model, habits = task.model if plan.sole else copied(task.model), task.habits
        inner = getattr(plan.client, "__dict__", {}).values()
        reached = bool(users([type(plan.client), *map(type, inner), task.loss, task.forward]))
        kind = FlatModel if plan.device == "cpu" else CapturedModel
        self.model = kind(model, plan.dtype, plan.device, habits=habits, loss=task.loss, reached=reached)
        halve(self.model, plan.local.autocast)
        self.part = LocalPart.of(plan.buffers, self.model.layout, plan.client.keeps(self.model.layout))
        self.data = plan.data.to(plan.device) if data is None else data
        self.of_many: Callable[..., tuple[Tensor, Tensor]] | None = None  # gradients of several clients
        self.others_draw = may_draw(plan)  # from NumPy's or Python's generator
        self.seed("setup")
        plan.client.setup(plan.task, self.model.layout)
        self.watch = Watch(plan.client, task=task, model=self.model)
        self._elsewhere = Elsewhere(plan.client, task, (Job, Task, kind, Update))
        parts = [p for p in (self.data.dataset.train, self.data.dataset.test) if isinstance(p, Samples)]
        held = [
            t for p in parts for t in leaves((p.x, p.y)) if isinstance(t, Tensor) and not t.is_inference()
        ]
        self._samples = [(t, t._version) for t in held]
        privacy = None if plan.release is None else plan.release.privacy
        self._private = privacy if privacy is not None and privacy.level == "record" else None

    @cached_property
    def fresh(self) -> dict[str, Tensor]:
        """State of clients that never took part; one for all, since nobody may write to it."""
        self.seed("init_state")
        fresh = self.client.init_state(self.model.layout)
        if not isinstance(fresh, Mapping):
            raise ClientError(returned(self.client, "init_state", fresh, "a dict of tensors by name"))
        for name, value in fresh.items():
            if not isinstance(value, Tensor):
                raise ClientError(
                    returned(self.client, "init_state", value, "a tensor (torch.as_tensor)", f"[{name!r}]")
                )
        device, dtype = self.plan.device, self.plan.dtype
        return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in fresh.items()}

    def job(self, broadcast: Broadcast, chunk: Chunk, client: int) -> Job:
        """The job of one client."""
        plan, message, each = self.plan, broadcast.payload, chunk.part(client)
        if (standing := broadcast.standing) is not None:
            message = Payload({**standing.arrays, **message.arrays}, {**standing.values, **message.values})
        if each is not None:
            message = Payload({**message.arrays, **each.arrays}, {**message.values, **each.values})
        state, residuals = chunk.states.get(client), dict[str, Tensor]()
        if plan.release is not None and state:
            residuals = {k: v for k, v in state.items() if k.startswith(OWN)}
            state = {k: v for k, v in state.items() if k not in residuals}
        job = Job(
            client=client,
            round=chunk.turns.get(client, broadcast.round),
            task=plan.task,
            model=self.model,
            local=plan.kinds.local(client) if plan.kinds else plan.local,
            seed=plan.seed,
            message=message,
            state=state or self.fresh,
            source=self.data,
            purpose=broadcast.task,
            local_part=self.part,
            most_steps=chunk.steps.get(client),
            views=plan.views,
            residuals=residuals,
            private=None if self._private is None or is_measuring(broadcast.task) else self._private,
        )
        job.meter.effort = plan.effort
        return job

    def own_model(self, job: Job) -> nn.Module:
        """The model that the client of ``job`` is measured with, as a module by itself."""
        self.seed(f"{job.purpose}/layers", job.round, job.client)
        self.client.prepare(job)
        return self.client.own_model(job)  # type: ignore[attr-defined, no-any-return]  # see fedsim.run.personal

    def call(self, job: Job, task: str) -> Update:
        """The client's answer to the exchange ``task``."""
        return self.checked(job, self.begin(job, task), task)

    def begin(self, job: Job, task: str) -> object:
        """What the client's code returns in the exchange ``task``; on a GPU it may be under way still."""
        method: Callable[[Job], object] | None
        spare = replace(job) if self._elsewhere.next() else None
        if task == HELD_OUT:
            method = partial(held_out, start=self.client.newcomer)
        else:
            method = getattr(self.client, task.rpartition("/")[2], None)
        if not callable(method):
            raise ClientError(
                f"the exchange asks for '{task}', but {type(self.client).__name__} has no such method"
            )
        before = _settings() if self.model.reached else None
        try:
            with ReadOnly([job], self.watch):
                found = self._done(job, method, task)
                if spare is not None:
                    self._elsewhere.check(
                        job.client, job.round, partial(self._repeats, found, spare, method, task)
                    )
            for samples, version in self._samples:
                if samples._version != version:
                    raise ReadOnlyError(
                        f"client {job.client} in round {job.round + 1}: wrote to the samples, which other clients and "
                        "rounds read; work on a .clone(), or on the batches of job.batches()"
                    )
            self.model.check()
            self.model.forget()
        except BaseException:
            self.model.repair()
            raise
        finally:
            if before is not None and _settings() != before:
                _set_back(*before)
        return found

    def _done(self, job: Job, method: Callable[[Job], object], task: str) -> object:
        self.seed(f"{job.purpose}/layers", job.round, job.client)
        if task != HELD_OUT:  # measured on its samples as they are, whatever the method
            self.client.prepare(job)
        return method(job)

    def _repeats(self, found: object, spare: Job, method: Callable[[Job], object], task: str) -> bool:
        """Whether a job that gave ``found`` gives the same once more, by an equal one that nobody used yet."""
        if self.plan.device != "cpu" or not isinstance(found, Update):  # it may be under way still
            return True
        first = bits_of(found)
        self.model.forget()
        spare.meter.effort = self.plan.effort
        try:
            second = self._done(spare, method, task)
        except Exception:  # an iterator that has come to its end
            return False
        return isinstance(second, Update) and bits_of(second) == first

    def checked(self, job: Job, found: object, task: str) -> Update:
        """What a client's own code returned, if it is an update and loses nothing."""
        update = as_update(self.client, task, found)
        if job.local_part.is_lost(update, job.kept):
            raise ClientError(
                "where weights stay with clients, the update's delta must come from job.delta(w)"
            )
        return update

    def seed(self, purpose: str, *numbers: int) -> None:
        """Seed what code draws from without a generator of its own: layers, and where others' code takes part also
        NumPy and Python. ``torch.manual_seed`` would do, but formats a stack trace on each call."""
        number = key(self.plan.seed, purpose, *numbers)
        torch.default_generator.manual_seed(number >> 1)
        if self.plan.device != "cpu":
            torch.cuda.manual_seed(number >> 1)
        if self.others_draw:
            seed_others(number)


def _settings() -> tuple[torch.dtype, int, bool]:
    """Torch's own, of this process."""
    return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()


def _set_back(dtype: torch.dtype, threads: int, grad: bool) -> None:
    """They are as they were: other clients and runs compute under them."""
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


class ReadOnly:
    """Finds out whether messages or states of ``jobs`` are written to inside a ``with`` block, or ``watch`` sees that
    the client keeps something elsewhere.

    Raises:
        ReadOnlyError, KeptError: at its end, naming client, round and what, even where the client's code raised.
    """

    def __init__(self, jobs: Sequence[Job], watch: Watch):
        self._watch, self._last = watch, jobs[-1]
        self._seen = [
            (job, kind, name, t, t._version)
            for job in jobs
            for kind, held in (("message", job.message.arrays), ("state", job.state))
            for name, t in held.items()
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for job, kind, name, tensor, version in self._seen:
            if tensor._version != version:
                raise ReadOnlyError(
                    f"client {job.client} in round {job.round + 1}: its {kind} is read-only, but '{name}' was "
                    "written to; work on a .clone(), and return new state in Update.state"
                )
        self._watch.check(self._last.client, self._last.round)
