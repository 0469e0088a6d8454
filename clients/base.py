"""The local half of a method. The default is plain SGD (McMahan et al. 2017), from which every other rule departs."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from fedsim.data.local import Batch
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.answer import as_update, as_vector
from fedsim.local.interface import ClientLike
from fedsim.local.job import Job
from fedsim.task.evaluation import sample_losses
from fedsim.task.layout import Layout
from fedsim.task.standalone import present
from fedsim.task.task import Task

OFF_THE_RULE = frozenset(
    {
        "setup",
        "init_state",
        "evaluate",
        "test",
        "losses",
        "utility",
        "own_weights",
        "own_model",
        "newcomer",
        "personalises",
    }
)  # no part of training


class Client:
    """Local half of a method; pickled once to the workers, so it keeps nothing between jobs: what has changed on it
    after a job is refused. ``caches`` names attributes that may lose or gain what any job would compute again.

    Most rules override ``step`` (``begin`` for what is constant in a round, ``finish`` for what is sent). A rule with
    several networks or phases overrides ``fit``. Further exchanges call the method named by ``task``. Where
    clients have models of their own, ``own_weights`` (or ``own_model``) says which: it is measured, and handed out.

    ``vectorisable``: ``begin`` and ``step`` are written over vectors (..., d) whose leading axes are clients, treat
    every client alike and use only what ``fedsim.engine.vectorised.ChunkJob`` has, and ``fit`` is the one below. A
    subclass that changes anything of the rule must say so again; else its clients run one by one.

    ``grad_only``: samples are looked at by ``job.grad`` and ``job.descend`` alone, and nothing else of them is sent:
    what ``privacy=record`` needs. A subclass that changes anything of the rule must say so again; else it is refused.
    """

    vectorisable: ClassVar[bool] = False
    caches: ClassVar[frozenset[str]] = frozenset()
    grad_only: bool = True

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.vectorisable and _changed(cls, "vectorisable"):
            cls.vectorisable = False
        if cls.grad_only and _changed(cls, "grad_only", besides="keeps"):
            cls.grad_only = False

    def setup(self, task: Task, layout: Layout) -> None:
        """Once per worker, before the first job: build further networks here."""

    def keeps(self, layout: Layout) -> frozenset[str]:
        """Names of the parameters that never leave their client; ``job.start`` puts them in place again."""
        return frozenset()

    def init_state(self, layout: Layout) -> dict[str, Tensor]:
        """What a client that never took part keeps: names to tensors. Empty unless the method has client state."""
        return {}

    def prepare(self, job: Job) -> None:
        """Before the client's part in any exchange, measuring included: a rule may replace ``job.data`` here."""

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """Once per job, before the first step: ``w`` (..., d) is the received model; returns where training starts.

        What stays constant during the job may be put into ``job.keep``.
        """
        return w

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One mini-batch step on ``w`` (..., d); leading axes are clients. May work in place; returns the new ``w``."""
        return job.descend(w, batch)

    def finish(self, job: Job, w: Tensor) -> Update:
        """What is sent: by default ``delta = w - anchor`` (d,), weighted by the number of samples."""
        return Update({"delta": job.delta(w)}, weight=len(job.data), metrics=job.report())

    def fit(self, job: Job) -> Update:
        """Local training: ``step`` over the round's batches. A client without samples refuses."""
        if job.num_steps == 0:
            raise Refusal("no samples" if len(job.data) == 0 else "one sample, too few for BatchNorm")
        w = as_vector(self, "begin", self.begin(job, job.start()))
        shape = w.shape
        for batch in job.batches():
            w = self.step(job, w, batch)
            if not isinstance(w, Tensor):
                break
        update = self.finish(job, as_vector(self, "step", w, shape))
        return update if isinstance(update, Update) else as_update(self, "finish", update)

    def losses(self, job: Job) -> Update:
        """Mean and root mean square loss of the received model over this client's training samples.

        For sampling rules that go by them; a forward pass over all its samples.
        """
        if len(job.data) == 0:
            raise Refusal("no samples")
        job.meter.forward(len(job.data))
        found = sample_losses(job.model, job.start(), job.data, job.task)
        values = {"loss": float(found.mean()), "loss_rms": float(found.square().mean().sqrt())}
        return Update(values=values, metrics=values, weight=len(job.data))

    def utility(self, job: Job) -> Update:
        """The same where it costs nothing, since a real client would know it from its training."""
        return self.losses(job)

    def own_weights(self, job: Job) -> Tensor:
        """The model ``w`` (d,) that this client is measured with, its statistics in ``job.model.buffers``: by default
        the received one, with what never leaves the client."""
        return job.start()

    def own_model(self, job: Job) -> nn.Module:
        """The same as a module by itself, a copy; for rules whose clients predict by more than a model's weights."""
        return present(job.task.model, job.model, self.own_weights(job))

    def newcomer(self, job: Job) -> Tensor:
        """The model (d,) that a client which never takes part starts from, in the resident vector."""
        return job.start()

    @property
    def personalises(self) -> bool:
        """Whether ``own_weights`` or ``own_model`` differ by client, beyond what never leaves it.

        Raises:
            ConfigError: of a class that measures in a way of its own and does not say with what model.
        """
        kind = type(self)
        own = kind.own_weights is not Client.own_weights or kind.own_model is not Client.own_model
        if not own and kind.evaluate is not Client.evaluate:
            raise ConfigError(
                f"{kind.__name__}.evaluate measures in a way of its own; define {kind.__name__}.own_weights(job) -> w, "
                "the model that it measures, and use it there"
            )
        return own

    def evaluate(self, job: Job) -> Update:
        """Measure this client's model on its held-out samples (task metrics, means)."""
        if job.holdout is None or len(job.holdout) == 0:
            raise Refusal("no held-out samples")
        return Update(metrics=job.measure(job.holdout, self.own_weights(job)), weight=job.units(job.holdout))


def _changed(cls: type, trait: str, besides: str = "") -> bool:
    """Whether ``cls`` changes anything of the rule since ``trait`` was declared; ``besides``: but this method."""
    declared = next(c for c in cls.__mro__ if trait in vars(c))
    return any(_differs(cls, declared, name) for name in dir(declared) if name != besides)


def _differs(cls: type, declared: type, name: str) -> bool:
    """Whether ``cls`` has another method or property ``name`` than ``declared``, and training may depend on it."""
    if name.startswith("__") or name in OFF_THE_RULE:
        return False
    theirs = inspect.getattr_static(declared, name)
    return hasattr(theirs, "__get__") and inspect.getattr_static(cls, name) is not theirs


_: type[ClientLike] = Client  # the type checker sees that nothing is lacking
