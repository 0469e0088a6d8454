"""A client's own model after a run: the one that it would be measured with, from its state and the run's."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig
from torch import nn

from fedsim.engine.assignments import Broadcast, Chunk, Plan
from fedsim.engine.base import SerialEngine
from fedsim.engine.resident import Resident
from fedsim.errors import CheckpointError, ConfigError
from fedsim.exchange.payload import Refusal
from fedsim.local.job import Job
from fedsim.rng import key as draw_key
from fedsim.rng import seed_global, undisturbed
from fedsim.run import assigning, participants
from fedsim.run.assembly import assemble
from fedsim.run.given import Given
from fedsim.run.key import keys_before, marked, run_key
from fedsim.run.needs import refuse_partial
from fedsim.run.preparation import learning_task, load_data
from fedsim.server import checkpoint
from fedsim.server.loop import Loop
from fedsim.server.round import Round
from fedsim.tracking import Trackers


class OwnModel(Protocol):
    """What a local rule says of the models of its clients; see ``clients.base.Client``."""

    @property
    def personalises(self) -> bool:
        """Whether they differ by client, beyond what never leaves it."""

    def own_model(self, job: Job) -> nn.Module:
        """The one that the client of ``job`` is measured with."""


class Asked(BaseException):
    """The client was asked to measure its model: by this broadcast, in this chunk."""

    def __init__(self, broadcast: Broadcast, chunk: Chunk):
        self.broadcast, self.chunk = broadcast, chunk


class Attentive(SerialEngine):
    """Waits for the strategy to let ``client`` be measured: it alone knows what each client receives for that."""

    def __init__(self, client: int):
        super().__init__()
        self.client = client

    def start(self, plan: Plan) -> None:
        """Keep the plan too."""
        super().start(plan)
        self.plan = plan

    def map(
        self, method: str, shared: Any, items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> Iterator[Any]:
        """As any engine, but for the exchange that is waited for."""
        if method == "run" and shared.task == "evaluate":
            for chunk in items:
                if self.client in chunk.clients:
                    raise Asked(shared, chunk)
        return super().map(method, shared, items, costs)


@dataclass(frozen=True)
class Source:
    """What a run was made of, for whoever comes back to it; ``given`` refers to what a caller handed over."""

    config: DictConfig
    given: Given
    key: str | None = None  # of the run; ``None``: still to be compared with that of the checkpoint

    def key_of(self, saved: Path) -> str:
        """The run's key, which the checkpoint ``saved`` has too.

        Raises:
            ConfigError: if something that was handed over in Python is missing, or is not what it was.
        """
        if self.key is not None:
            return self.key
        handed = {"strategy": self.given.strategy, "model": self.given.model, "data": self.given.clients}
        missing = [k for k, v in handed.items() if v is None and "given" in (self.config.get(k) or {})]
        again = f"fedsim.load_run({str(self.config.dir)!r}, ...)"
        if missing:
            names = ", ".join(f"{'clients' if k == 'data' else k}=..." for k in missing)
            raise ConfigError(
                f"client models: {names} of this run came from Python; hand them over again: {again}"
            )
        mark = self.given.fingerprint()
        known = {marked(old, mark) for old in (run_key(self.config), *keys_before(self.config))}
        if (there := checkpoint.key_of(saved)) not in known:
            raise ConfigError(
                "client models: what is handed over is not what the run was made of (models count with their first "
                f"weights; clients, loss, initial, cohorts, strategy): hand over the same to {again}"
            )
        return str(there)


def personal(source: Source, folder: Path, client: int, rounds: int) -> nn.Module:
    """The model of ``client`` after ``rounds`` rounds, all of them, a module by itself in evaluation mode on the CPU.

    Raises:
        ConfigError: if there is no such client or the method has one model for all.
        CheckpointError: if the folder no longer holds the clients' states of that round.
    """
    try:
        client = operator.index(client)
    except TypeError:
        raise ConfigError(
            f"client={client!r}: give its number, 0 to {source.config.num_clients - 1}"
        ) from None
    config = source.config.copy()
    config.dir, config.engine.device = str(folder), "cpu"
    if config.engine.name == "flower":
        raise ConfigError(
            f"client={client}: this run is a deployment; clients' states, and so their models, lie at their nodes"
        )
    if not 0 <= client < config.num_clients:
        raise ConfigError(f"client={client}: this run has clients 0 to {config.num_clients - 1}")
    if client in assigning.absent(config)[0]:
        raise ConfigError(
            f"client={client}: it is never there (exclude, evaluation.held_out_clients), and has no model of its own"
        )
    saved = checkpoint.latest(folder / "checkpoint")
    if saved is None:
        raise CheckpointError(
            f"client={client}: {folder} has no checkpoint, which holds what clients keep; type the run's command again "
            "with resume=never"
        )
    engine = Attentive(client)
    try:
        with undisturbed():
            loop = _restored(source, config, engine, saved)
            if loop.done != rounds:
                raise CheckpointError(
                    f"client={client}: {folder} has gone on to round {loop.done}, this result is of round {rounds}; "
                    "load it again: fedsim.load_run"
                )
            return _asked(loop, engine, config).eval()
    finally:
        engine.close()


def _restored(source: Source, config: DictConfig, engine: Attentive, saved: Path) -> Loop:
    """The run as it was after its last round."""
    key = source.key_of(saved)
    method = participants.strategy(config, source.given.strategy)
    if method.traits.pooled:
        raise ConfigError(f"client={engine.client}: {type(method).__name__} has one model; leave client out")
    topology = participants.agreed(config, method)
    data = load_data(config, source.given, method)
    task = learning_task(config, source.given, data, method)
    loop = assemble(config, source.given, method, task, data, engine, Trackers([]), key, topology)
    loop.restore(saved)
    return loop


def _asked(loop: Loop, engine: Attentive, config: DictConfig) -> nn.Module:
    """What the client answers with when the strategy lets all clients be measured."""
    strategy, client = loop.strategy, engine.client
    refuse_partial(strategy.client, OwnModel, "strategy: its client", "clients.base.Client")
    index = loop.done - 1
    server = loop.server.begin(Round(index, (), loop.server.num_clients, config.seed, loop.server.local))
    seed_global(draw_key(config.seed, "server/round", index))
    try:
        strategy.evaluate_clients(server, loop.state)
    except Asked as asked:
        broadcast, chunk = asked.broadcast, asked.chunk
    else:
        raise ConfigError(f"client={client}: {type(strategy).__name__} does not measure it by itself")
    resident = Resident(engine.plan)
    each, rule = chunk.part(client), engine.plan.client
    kept = bool(resident.part.spans) or resident.part.buffers
    if not (kept or rule.personalises or (each is not None and "w" in each.arrays)):  # type: ignore[attr-defined]
        raise ConfigError(
            f"client={client}: {type(strategy).__name__} has one model for all clients, no personal ones; leave client "
            "out"
        )
    try:
        return resident.own_model(resident.job(broadcast, chunk, client))
    except Refusal as refusal:
        raise ConfigError(f"client={client}: it has no model of its own: {refusal}") from None
