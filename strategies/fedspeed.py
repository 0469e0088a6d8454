"""FedSpeed. Sun, Shen, Huang, Ding, Tao: FedSpeed: Larger Local Interval, Less Communication Round, and Higher
Generalization Accuracy, ICLR 2023 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from clients.fedspeed import FedSpeedClient
from strategies.base import check
from strategies.dual import DualStrategy


@dataclass(kw_only=True)
class FedSpeed(DualStrategy):
    """Local steps ``x <- x - lr (g - g_hat_i + lamb (x - x_start))``, ``g = (1 - alpha) g1 + alpha g2`` with ``g2`` the
    gradient of the same mini-batch at ``x + rho g1 / |g1|``; then ``g_hat_i -= lamb (x_K - x_start)``.

    ``lamb`` is the prox weight, the paper's 1/lambda. ``normalize=false`` ascends by ``rho g1``. The server, and
    ``beta``, ``dual_mean`` and ``weighting``, are those of ``DualStrategy``; the defaults are the authors' code's.
    """

    lamb: float
    rho: float
    alpha: float
    normalize: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.lamb > 0, "lamb", self.lamb, "the prox weight 1/lambda must be positive")
        check(self.rho >= 0, "rho", self.rho, "the ascent radius must not be negative")
        check(0 <= self.alpha <= 1, "alpha", self.alpha, "must lie in [0, 1]")
        self.client = FedSpeedClient(
            lamb=self.lamb,
            rho=self.rho,
            alpha=self.alpha,
            normalize=self.normalize,
            beta=self.beta,
            dual_mean=self.dual_mean,
            weighting=self.weighting,
        )
