"""FedDyn. Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama: Federated Learning Based on Dynamic
Regularization, ICLR 2021 (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from clients.dual import DualClient
from strategies.base import check
from strategies.dual import DualStrategy


@dataclass(kw_only=True)
class FedDyn(DualStrategy):
    """Local steps along ``g - g_i + alpha (x - x^t)``, then ``g_i -= alpha (x_K - x^t)``; the server's ``-h / alpha``
    is the mean dual ``hbar`` of ``DualStrategy``."""

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.alpha > 0, "alpha", self.alpha, "the weight of the dynamic regulariser must be positive")
        self.client = DualClient(
            lamb=self.alpha, beta=self.beta, dual_mean=self.dual_mean, weighting=self.weighting
        )
