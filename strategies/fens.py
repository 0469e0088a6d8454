"""FENS. Allouah, Dhasade, Guerraoui, et al.: Revisiting Ensembling in One-Shot Federated Learning, NeurIPS 2024.

All models go to all clients, which learn by FedAvg how to put their outputs together. One-shot in the models only: what
goes over the links afterwards is counted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.fens import KINDS, aggregator, vector_of, with_vector
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Message
from fedsim.rng import hash_tensors, key
from fedsim.server.depot import Upload, Uploads
from fedsim.server.exchanges import Server
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.one_shot import OneShot

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FENS(OneShot):
    """A learned aggregator over all models; a round is one of FedAvg on it.

    Its numbers are those of aggregator and models together (plain names); the model that the run ends with is FedAvg of
    the models, the vector ``fens/h`` of the checkpoint the aggregator.

    Args:
        kind: of the aggregator: ``weights``, one per client and class; ``linear``; ``mlp``.
        steps: full-batch steps of a client in a round.
        lr: their rate.
    """

    traits: ClassVar[Traits] = replace(OneShot.traits, metrics=frozenset({"aggregator_loss"}))
    proxy: float = 0.1
    kind: str = "weights"
    steps: int = 1
    lr: float = 0.05

    def __post_init__(self) -> None:
        check(self.kind in KINDS, "kind", self.kind, f"choose one of {', '.join(KINDS)}")
        check(self.steps >= 1, "steps", self.steps, "must be at least 1")
        check(self.lr > 0, "lr", self.lr, "must be positive")
        if not self.proxy:
            log.warning(
                "strategy.proxy=0: the aggregator learns on samples that the models were fitted to, and trusts them "
                "too much; type strategy.proxy=0.1"
            )
        super().__post_init__()

    @property
    def averages(self) -> bool:
        """Its result is the aggregated ensemble."""
        return False

    def begun(self, server: Server, state: State, uploads: Uploads) -> State:
        """FedAvg of the models, and a fresh aggregator.

        Raises:
            ConfigError: if the models may have seen what the aggregator learns from.
        """
        if self.proxy and not uploads.asked:
            raise ConfigError(
                f"strategy.uploads={self.uploads}: these models were trained under other settings of clients, split, "
                "seed or proxy than this run's, so they may have seen the samples that "
                f"strategy.proxy={self.proxy:g} keeps for the aggregator; type strategy.uploads=auto"
            )
        state = super().begun(server, state, uploads)
        drawn = aggregator(
            self.kind, len(uploads), server.workshop.outputs, key(server.seed, "fens") >> 1, server.dtype
        )
        known = torch.zeros(len(server.sizes), dtype=torch.float64)
        numbers = [m.architecture for m in uploads.models]
        mixed = {"fens/architectures": numbers} if any(numbers) else {}
        return state | {"fens/h": vector_of(drawn), "fens/known": known} | mixed

    def epoch(self, server: Server, state: State, uploads: Uploads, e: int) -> State:
        """One round of FedAvg of the aggregator, of those who have the outputs of all models."""
        known = self._handed_out(server, state, uploads)
        h: Tensor = state["fens/h"]
        message = Message.of({"w": h}, {"kind": self.kind, "steps": self.steps, "lr": self.lr})
        having = [c for c in server.round.cohort if known[c]]
        replies = server.exchange(message, {"delta": "mean"}, task="aggregate", clients=having)
        if len(replies):
            h = h + replies.mean("delta")
        server.log["aggregator_hash"] = hash_tensors([h])
        return state | {"fens/h": h, "fens/known": known}

    def _handed_out(self, server: Server, state: State, uploads: Uploads) -> Tensor:
        """All models go to all clients, which keep their outputs; who has them (m,)."""
        known: Tensor = state["fens/known"]
        needy = [c for c in server.round.cohort if not known[c]]
        if not needy:
            return known
        having = set(needy)
        with server.apart("models_down"):
            for number, models in _by_architecture(uploads).items():
                arrays = {"models": torch.stack([m.weights.w for m in models])}
                if len(models[0].weights.buffers):
                    arrays["model_buffers"] = torch.stack([m.weights.buffers for m in models])
                message = Message.of(arrays, {"architecture": number} if number else {})
                asked = [c for c in needy if c in having]
                replies = server.exchange(message, {}, task="outputs", clients=asked, architecture=number)
                having &= set(replies.clients)
        known = known.clone()
        known[sorted(having)] = 1
        return known

    def combined(self, f: Tensor, state: State) -> dict[str, Tensor]:
        """The aggregator over all models; those of one architecture side by side, as clients have their outputs."""
        if "fens/architectures" in state:
            f = f[torch.argsort(torch.tensor(state["fens/architectures"]), stable=True)]
        module = aggregator(self.kind, len(f), f.shape[2], 0, f.dtype)
        with torch.no_grad():
            found: Tensor = with_vector(module, state["fens/h"])(f)
        return {"ensemble": found}

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """Plain numbers are the aggregator's; FedAvg has its name."""
        out = super().evaluate(server, state)
        own = {k.partition("/")[2]: v for k, v in out.items() if k.startswith("ensemble/")}
        return out | own


def _by_architecture(uploads: Uploads) -> dict[int, list[Upload]]:
    out: dict[int, list[Upload]] = {}
    for model in uploads.models:
        out.setdefault(model.architecture, []).append(model)
    return dict(sorted(out.items()))
