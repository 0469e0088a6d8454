"""FedEx-LoRA. Singhal, Ponkshe, Vepakomma: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models, 2024 (arXiv 2410.09432)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.exact import moved, residuals
from fedsim.server.round import Round
from strategies.base import State
from strategies.exact import ExactAverage


@dataclass(kw_only=True)
class FedEx(ExactAverage):
    """``A = sum p_i A_i``, ``B = sum p_i B_i``, and ``W <- W + s (sum p_i B_i A_i - B A)``: the effective weight is
    the exact mean of the clients' own.

    Where the authors' code averages plainly whatever n_i, clients weigh here as ``weighting`` says. The residual has
    the base's orientation, transposed where a layer keeps (in, out).
    """

    exact = "residual"

    def settle(self, state: State, rows: Tensor, q: Tensor, round: Round) -> tuple[Tensor, Tensor]:
        """Mean factors; what clipping takes from a client's weight falls to the factors from before."""
        changes = residuals(self.adapters, rows, q)
        return self.averaged(state["w"], rows, q), moved(state["buffers"], self.adapters, changes)
