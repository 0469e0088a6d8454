"""One-shot federated learning: every client is asked once, for a trained model; all else is the server's work.

By itself the first step alone, whose result is FedAvg of the models; other methods go on from the same models. A round
is one epoch of the server's work, not an exchange: only the first has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clients.one_shot import OneShotClient, client_of
from fedsim.errors import StrategyError
from fedsim.server.depot import Uploads
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.server.uploads import gathered, recalled
from strategies.base import State, Strategy
from strategies.ensembles import majority, mean_probabilities, uniform

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
        buffers="average",
        labels=True,
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
        """The state in which the server's work begins: by default FedAvg of the models."""
        return state | uploads.average._asdict()

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


def logits_of_all(server: Server, uploads: Uploads) -> Tensor:
    """Logits (K, n, C) of every model on the samples that the server measures on; computed by the workers."""
    return torch.stack([server.logits(m.weights) for m in uploads.models])


def references(server: Server, uploads: Uploads, f: Tensor) -> dict[str, Any]:
    """What every one-shot method is measured against, of the same models: FedAvg, the best single one, the mean of
    logits, the mean of probabilities, the majority's vote."""
    k = best_client(server, uploads)
    scored = {
        "uniform": server.score(uniform(f)),
        "probabilities": server.score(mean_probabilities(f)),
        "vote": {name: v for name, v in server.score(majority(f)).items() if name != "loss"},
        "best_client": server.score(f[k]) | {"client": uploads.models[k].client},
        "fedavg": server.evaluate(uploads.average),
    }
    return {f"{name}/{metric}": v for name, found in scored.items() for metric, v in found.items()}


def best_client(server: Server, uploads: Uploads) -> int:
    """Position of the model with the highest accuracy on the common validation set; without one, of the client with
    most samples. Test samples have no say."""
    if server.validator is None:
        return int(uploads.samples.argmax())
    on = server.on("val")
    found = [on.score(on.logits(m.weights)).get("accuracy", 0.0) for m in uploads.models]
    return max(range(len(found)), key=found.__getitem__)


def teachers(server: Server, uploads: Uploads) -> Sequence[nn.Module]:
    """All models as modules that are frozen and in evaluation mode."""
    shop = server.workshop
    return shop.kept(f"teachers/{uploads.hash}", lambda: [shop.frozen(m.weights) for m in uploads.models])


def logits_of_teachers(server: Server, models: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """``x -> f`` (K, B, C), one model after the other, with gradient to x."""
    return lambda x: torch.stack([server.workshop.logits(m, x) for m in models])


def _models(server: Server, state: State) -> Uploads:
    expected: str = state["uploads"]
    return server.workshop.kept(f"uploads/{expected}", lambda: recalled(server, expected))


def check_images(server: Server, name: str) -> tuple[int, ...]:
    """The shape of one sample, of data whose samples can be made from nothing: one tensor of numbers.

    Raises:
        StrategyError: for tokens, or several tensors.
    """
    x, shape = server.task.example, server.workshop.shape
    if not isinstance(x, Tensor) or not x.is_floating_point() or not shape:
        raise StrategyError(
            f"{name} makes samples of its own, so samples must be one tensor of numbers; type strategy=feddf, or "
            "strategy=one_shot"
        )
    return shape
