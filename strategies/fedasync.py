"""FedAsync. Xie, Koyejo, Gupta: Asynchronous Federated Optimization, 2019 (Algorithm 1, section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.fedprox import FedProxClient
from fedsim.server.flight import Answer
from fedsim.server.traits import Traits
from strategies.asynchronous import Asynchronous
from strategies.base import State, check


@dataclass(kw_only=True)
class FedAsync(Asynchronous):
    """Each answer ``x_i`` moves the model: ``x <- (1 - alpha_t) x + alpha_t x_i`` with ``alpha_t = alpha s(tau)``.

    Clients take local steps along ``g + mu (x - x^tau)`` (the paper's rho). ``answers_per_round`` of them make a round.
    """

    traits: ClassVar[Traits] = replace(
        Asynchronous.traits,
        mean_only="strategy=fedasync hears one client at a time; leave it out, or type strategy=fedbuff",
    )
    alpha: float
    mu: float
    answers_per_round: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.alpha <= 1, "alpha", self.alpha, "must be in (0, 1]")
        check(self.mu >= 0, "mu", self.mu, "the prox weight must not be negative")
        check(self.answers_per_round >= 1, "answers_per_round", self.answers_per_round, "must be at least 1")
        self.client = FedProxClient(weighting="uniform", mu=self.mu)

    @property
    def answers(self) -> int:
        """As configured: only what counts as a round."""
        return self.answers_per_round

    def absorb(self, state: State, answer: Answer) -> State:
        """Mix the client's model in, less the older the model it started from."""
        alpha = self.alpha * self.scale(state["version"] - answer.version)
        model = answer.sent["w"] + answer.arrays["delta"]
        out = state | {"w": (1 - alpha) * state["w"] + alpha * model, "version": state["version"] + 1}
        if "buffers" in answer.arrays:
            out["buffers"] = (1 - alpha) * state["buffers"] + alpha * answer.arrays["buffers"]
        return out
