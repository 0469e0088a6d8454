"""One-shot federated learning: every client is asked once, for a trained model; all else is the server's work.

By itself the first step alone, whose result is FedAvg of the models; other methods go on from the same models. A round
is one epoch of the server's work, not an exchange: only the first has one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.one_shot import OneShotClient, client_of
from fedsim.errors import ConfigError
from fedsim.server.depot import Uploads
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.server.uploads import gathered, recalled
from fedsim.task.heads import check_logits
from fedsim.task.vectors import Weights
from strategies.base import State, Strategy
from strategies.ensembles import majority, mean_probabilities, uniform

log = logging.getLogger(__name__)

ONCE = "one-shot methods work on the single models; leave it out"


@dataclass(kw_only=True)
class OneShot(Strategy):
    """The models of all clients, and FedAvg of them.

    Args:
        uploads: ``auto``: asked for in the first round, or found where a run of the same settings left them; or the
            folder of a run whose models are taken.
        proxy: share of each client's samples that its model never sees, kept for FENS's aggregator.
    """

    traits: ClassVar[Traits] = Traits(
        everybody=True,
        uploads="auto",
        disjoint=True,
        asked_only=True,
        architectures=True,
        buffers="average",
        labels=True,
        logits=True,
        mean_only=ONCE,
        discloses="the server of a one-shot method uses each client's model by itself, and only sums are covered; type "
        "strategy=fedavg or another method of the table in docs/privacy.md",
    )
    uploads: str = "auto"
    proxy: float = 0.0
    client: OneShotClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.make_client()
        if self.uploads != "auto":
            self.traits = replace(self.traits, uploads=self.uploads)  # type: ignore[misc]

    def make_client(self) -> OneShotClient:
        """The local half: the same for all methods that start from models."""
        return client_of(self.proxy)

    @property
    def averages(self) -> bool:
        """Whether it cannot do without FedAvg of the models, which is of those like the run's own."""
        return True

    def init(self, server: Server) -> State:
        """Refuses to begin if it needs FedAvg and no class of clients trains the run's model, if outputs of models
        cannot be put together, or models of another run not be taken."""
        if self.uploads != "auto" and (server.clock is not None or server.remote):
            raise ConfigError(
                f"strategy.uploads={self.uploads}: where devices are simulated, and in a deployment, clients are asked "
                "in every run; type strategy.uploads=auto, or system=none in a simulation"
            )
        check_outputs(server, type(self).__name__)
        kinds = server.kinds
        if self.averages and server.others and kinds is not None and 0 not in kinds.architectures:
            raise ConfigError(
                f"client.classes: {type(self).__name__} averages models of the run's architecture, which no class "
                "trains; leave `model` out of one of them, or type strategy=co_boosting, dense, feddf or fens"
            )
        return super().init(server)

    def round(self, server: Server, state: State, round: Round) -> State:
        """Models, unless they are there; then an epoch of the server's work."""
        if "uploads" not in state:
            found = gathered(server, self.message(state, round))
            if found is None:
                return state
            server.log["models"] = len(found)
            state = self.begun(server, state | {"uploads": found.hash, "epoch": 0}, found)
        else:
            found = _models(server, state)
        state = self.epoch(server, state, found, state["epoch"])
        return state | {"epoch": state["epoch"] + 1}

    def begun(self, server: Server, state: State, uploads: Uploads) -> State:
        """The state in which the server's work begins: by default FedAvg of the models; if none is like the run's own,
        this as it was drawn."""
        return state | fedavg(state, uploads)._asdict()

    def epoch(self, server: Server, state: State, uploads: Uploads, e: int) -> State:
        """One epoch of the server's work, the e-th from 0."""
        return state

    def combined(self, f: Tensor, state: State) -> Mapping[str, Tensor]:
        """Logits (n, C) of the method's own ensembles, by name, from the models' logits ``f`` (K, n, C)."""
        return {}

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """Of the method's model plain; of its ensembles and of what every method is measured against under names."""
        out = super().evaluate(server, state)
        if "uploads" not in state or not out:
            return out
        found = _models(server, state)
        kept = server.workshop.kept
        name = f"{found.hash}/{server.measured_on}"
        f = kept(f"logits/{name}", lambda: logits_of_all(server, found))
        for label, logits in self.combined(f, state).items():
            out |= {f"{label}/{k}": v for k, v in server.score(logits).items()}
        return out | kept(f"references/{name}", lambda: references(server, found, f))


def fedavg(state: State, uploads: Uploads) -> Weights:
    """FedAvg of the models like the run's own; if none of them came, this as it was drawn, which is said."""
    average = uploads.average
    if average is None:
        log.warning("nobody sent a model like the run's, so there is no FedAvg: it begins as it was drawn")
        return Weights(state["w"], state["buffers"])
    return average


def logits_of_all(server: Server, uploads: Uploads) -> Tensor:
    """Logits (K, n, C) of every model on the samples that the server measures on; computed by the workers."""
    return torch.stack([server.logits(m.weights, m.architecture) for m in uploads.models])


def references(server: Server, uploads: Uploads, f: Tensor) -> dict[str, Any]:
    """What every one-shot method is measured against, of the same models: the best single one, the mean of logits, the
    mean of probabilities, the majority's vote, and FedAvg of those that are like the run's own, if there are any."""
    k = best_client(server, uploads)
    scored = {
        "uniform": server.score(uniform(f)),
        "probabilities": server.score(mean_probabilities(f)),
        "vote": {name: v for name, v in server.score(majority(f)).items() if name != "loss"},
        "best_client": server.score(f[k]) | {"client": uploads.models[k].client},
    }
    if (average := uploads.average) is not None:
        scored["fedavg"] = server.evaluate(average)
    return {f"{name}/{metric}": v for name, found in scored.items() for metric, v in found.items()}


def best_client(server: Server, uploads: Uploads) -> int:
    """Position of the model with the highest accuracy on the common validation set; without one, of the client with
    most samples. Test samples have no say."""
    if server.validator is None:
        return int(uploads.samples.argmax())
    on = server.on("val")
    logits = (on.logits(m.weights, m.architecture) for m in uploads.models)
    found = [on.score(f).get("accuracy", 0.0) for f in logits]
    return max(range(len(found)), key=found.__getitem__)


def _models(server: Server, state: State) -> Uploads:
    expected: str = state["uploads"]
    return server.workshop.kept(f"uploads/{expected}", lambda: recalled(server, expected))


def check_outputs(server: Server, name: str) -> None:
    """That every model which is trained tells all classes apart, and all of them the same number.

    Raises:
        ConfigError: naming the first that does not.
    """
    classes, own = server.workshop.num_classes, server.workshop.outputs
    for number in sorted({0, *server.trained}):
        task = server.architecture(number).task
        found = check_logits(task, name) if number else own
        if found is not None and (found < classes or found != own):
            rest = f", {type(server.task.model).__name__} {own}" if number else ""
            raise ConfigError(
                f"model: {type(task.model).__name__} gives {found} logits{rest}, and there are {classes} classes; "
                f"{name} puts them together class by class: give all models one output for each class"
            )


def check_images(server: Server, name: str) -> tuple[int, ...]:
    """The shape of one sample, of data whose samples can be made from nothing: one tensor of numbers.

    Raises:
        ConfigError: for tokens, or several tensors.
    """
    x, shape = server.task.example, server.workshop.shape
    if not isinstance(x, Tensor) or not x.is_floating_point() or not shape:
        raise ConfigError(
            f"{name} makes samples of its own, so samples must be one tensor of numbers; type strategy=feddf, or "
            "strategy=one_shot"
        )
    return shape
