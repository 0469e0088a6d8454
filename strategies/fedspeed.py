"""FedSpeed. Sun, Shen, Huang, Ding, Tao: FedSpeed: Larger Local Interval, Less Communication Round, and Higher
Generalization Accuracy, ICLR 2023 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from clients.base import Client
from clients.fedspeed import FedSpeedClient
from clients.sgd import WEIGHTINGS
from fedsim.payload import Fold, Replies
from fedsim.server import Round, Server
from strategies.base import State, Strategy, check


@dataclass(kw_only=True)
class FedSpeed(Strategy):
    """Local steps ``x <- x - lr (g - g_hat_i + lamb (x - x_start))``, ``g = (1 - alpha) g1 + alpha g2`` with ``g2`` the
    gradient of the same mini-batch at ``x + rho g1 / |g1|``; then ``g_hat_i -= lamb (x_K - x_start)``.

    ``lamb`` is the prox weight, the paper's 1/lambda. ``normalize=false`` ascends by ``rho g1``. ``beta`` starts at
    ``x + beta (x - last local model)`` (relaxed initialisation of the authors' code). ``dual_mean``: ``all`` adds the
    mean dual over all m clients, as the authors' code does, with one server vector ``hbar``; ``active`` over the cohort, as
    published, which does not converge under partial participation. ``weighting``: ``uniform`` or by ``samples``.
    """

    lamb: float
    rho: float
    alpha: float
    normalize: bool
    beta: float
    dual_mean: str
    weighting: str
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        check(self.lamb > 0, "lamb", self.lamb, "the prox weight 1/lambda must be positive")
        check(self.rho >= 0, "rho", self.rho, "the ascent radius must not be negative")
        check(0 <= self.alpha <= 1, "alpha", self.alpha, "must lie in [0, 1]")
        check(self.dual_mean in ("all", "active"), "dual_mean", self.dual_mean, "choose one of all, active")
        check(
            self.weighting in WEIGHTINGS,
            "weighting",
            self.weighting,
            f"choose one of {', '.join(WEIGHTINGS)}",
        )
        self.client = FedSpeedClient(
            lamb=self.lamb,
            rho=self.rho,
            alpha=self.alpha,
            normalize=self.normalize,
            beta=self.beta,
            dual_mean=self.dual_mean,
            weighting=self.weighting,
        )

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """The update's mean, and the plain sum that moves the mean dual."""
        if self.dual_mean == "active":
            return {"delta": "mean", "h": "mean"}
        delta = {"delta": ("mean", "sum") if self.weighting == "samples" else "sum"}
        return delta | ({"moved": "sum"} if self.beta else {})

    def init(self, server: Server) -> State:
        """Adds ``hbar`` (d,), the mean of all clients' duals h_i."""
        state = super().init(server)
        return state | ({"hbar": torch.zeros_like(state["w"])} if self.dual_mean == "all" else {})

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """``hbar += (1/m) sum_i (x_K - x_start)``, then ``x <- x + mean(x_K - x) + hbar``."""
        delta = self.aggregate(replies)
        if self.dual_mean == "active":
            return state | {"w": state["w"] + delta + replies.mean("h")}
        hbar = state["hbar"] + replies.total("moved" if self.beta else "delta") / round.num_clients
        return state | {"w": state["w"] + delta + hbar, "hbar": hbar}
