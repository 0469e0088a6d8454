"""FedEx-LoRA. Singhal, Ponkshe, Vepakomma: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models, 2024 (arXiv 2410.09432)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.server.round import Round
from fedsim.task.lowrank import cross_term
from strategies.base import State
from strategies.exact import ExactAverage, moved, wide


@dataclass(kw_only=True)
class FedEx(ExactAverage):
    """``A = sum p_i A_i``, ``B = sum p_i B_i``, and ``W <- W + s (sum p_i B_i A_i - B A)``: the effective weight is
    the exact mean of the clients' own.

    Where the authors' code averages plainly whatever n_i, clients weigh here as ``weighting`` says. The residual has
    the base's orientation, transposed where a layer keeps (in, out).
    """

    def settle(self, state: State, rows: Tensor, q: Tensor, round: Round) -> tuple[Tensor, Tensor]:
        """Mean factors; what clipping takes from a client's weight falls to the factors from before."""
        whole = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        p = torch.cat([q, (1 - q.sum()).clamp(min=0)[None]])
        changes = []
        for ad in self.adapters:
            a, b, weights = wide(*ad.factors(whole), p)
            changes.append(ad.scale * cross_term(a, b, weights / weights.sum()))
        return self.averaged(state["w"], rows, q), moved(state, self.adapters, changes)
