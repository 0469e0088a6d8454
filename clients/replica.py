"""Clients that keep a copy of the model by themselves: they are told what moved it, a few numbers a round, and not it.

A round's *frame* is what moved the model in it, as bytes; the log holds the frames of past rounds. A client that last
took part in round r holds the model that round r began with, is sent the frames of rounds r .. t-1, and replays them.
In a simulation all copies are equal, so that the model is at hand (``current``); bytes are counted all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.base import Client
from clients.codec import CODECS, Codes, SlopeCodec
from clients.slopes import Probe
from fedsim.config.schema import ClientConfig
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.local.rates import round_factor
from fedsim.rng import hash_tensors
from fedsim.task.layout import Layout

CURRENT = "current"  # a value of what all copies share: the model of the message is today's
MODEL = "model"  # an array of a message: the whole model, for who cannot or should not replay


@dataclass(frozen=True, kw_only=True)
class ReplicaClient(Client):
    """Base: brings its copy of the model up to date, then measures. A subclass says how frames move the model
    (``replay``) and what it measures (``contribution``).

    ``lr``: of the model's steps in round 0 (``client.lr_decay`` and ``client.round_schedule`` apply); ``eps``:
    distance of the two points of a difference; ``measure``: ``central``, ``forward`` or ``jvp``; ``codec``: log8, ref9
    or float32.
    """

    grad_only = False
    lr: float
    eps: float
    codec: str
    measure: str

    def fit(self, job: Job) -> Update:
        """Measure slopes at today's model; with a copy that cannot be brought there, say that there is nothing."""
        theta = self.replica(job)
        if theta is None:
            return self.nothing(job)
        return self.contribution(job, theta)

    def replica(self, job: Job) -> Tensor | None:
        """The model (d,) that this round begins with, or ``None`` if it cannot be told or is not the server's."""
        arrays, state, here = job.message.arrays, job.state, CURRENT in job.values
        if MODEL in arrays:
            return arrays[MODEL]
        since, held = job.round - self.rounds_in(job), int(state["synced"]) if state else 0
        if held != since or not (state or "w" in arrays):
            return None
        if here:
            return arrays["w"]
        theta = self.replay(job, state["w"] if state else arrays["w"], since)
        return theta if self.agrees(job, theta) else None

    def agrees(self, job: Job, theta: Tensor) -> bool:
        """Whether ``theta`` is the server's model, where the message says what that is."""
        wanted = job.values.get("hash")
        return wanted is None or wanted == digest(job.layout, theta)

    def nothing(self, job: Job) -> Update:
        """The update of a client that has nothing to say, since its copy of the model is not the server's."""
        return self.update_of(self.coding.nothing(self.count(job)))

    def kept(self, job: Job, theta: Tensor) -> dict[str, Tensor]:
        """What the client keeps: up to which round its copy is, and the copy where it has one of its own."""
        state = {"synced": theta.new_tensor(float(job.round))}
        if CURRENT in job.values:
            return state
        buffers = job.message.arrays.get("buffers", job.state.get("buffers"))
        return state | {"w": theta} | ({} if buffers is None else {"buffers": buffers})

    def update_of(self, codes: Codes, **more: object) -> Update:
        """An update of ``codes`` (n,), as one object of bytes, and nothing else that travels."""
        return Update(values={"slopes": self.coding.pack(codes)}, weighs=False, **more)  # type: ignore[arg-type]

    @property
    def coding(self) -> SlopeCodec:
        """The codec."""
        return CODECS[self.codec]

    def rate(self, local: ClientConfig, round: int) -> float:
        """The learning rate of ``round``."""
        return float(self.lr * round_factor(local, round))

    def probe(self, job: Job, theta: Tensor) -> Probe:
        """What measures slopes around ``theta``."""
        buffers = job.message.arrays.get("buffers", job.state.get("buffers"))
        return Probe(job, theta, buffers, self.eps, self.measure)

    def count(self, job: Job) -> int:
        """How many codes it answers with."""
        raise NotImplementedError(f"{type(self).__name__} must define count(job)")

    def rounds_in(self, job: Job) -> int:
        """Of how many rounds the message holds frames."""
        return 0

    def replay(self, job: Job, theta: Tensor, since: int) -> Tensor:
        """``theta`` (d,), as round ``since`` began with it, as this round does."""
        raise NotImplementedError(f"{type(self).__name__} must define replay(job, theta, since)")

    def contribution(self, job: Job, theta: Tensor) -> Update:
        """What is measured at ``theta``."""
        raise NotImplementedError(f"{type(self).__name__} must define contribution(job, theta)")


def digest(layout: Layout, theta: Tensor) -> bytes:
    """Eight bytes that tell copies of the model apart."""
    return bytes.fromhex(hash_tensors(layout.params.pieces(theta)))[:8]
