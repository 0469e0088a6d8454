"""Agnostic federated learning (not analytic, not active FL). Mohri, Sivek, Suresh: Agnostic Federated Learning, ICML
2019."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.exchange.payload import Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.weighed import Answers, LossWeighted

GROUPS = ("client", "domain")
LARGE = 1e6  # of what is projected: losses that diverge


def project_simplex(v: Tensor) -> Tensor:
    """The nearest point (n,) to ``v`` with entries >= 0 that sum to 1; by sorting (Duchi et al. 2008)."""
    u = v.sort(descending=True).values
    if float(u[0]) > LARGE:  # 1 would be lost beside it, and a shift moves no projection
        u, v = u - u[0], v - u[0]
    above = (u.cumsum(0) - 1) / torch.arange(1, len(u) + 1, dtype=v.dtype)
    rho = int((u > above).nonzero()[-1])
    return (v - above[rho]).clamp(min=0)


def afl_step(w: Tensor, lam: Tensor, deltas: Tensor, losses: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The next model (d,) and weights (n,) from updates (n, d) and losses (n,) of everybody at ``w``."""
    return w + lam.to(deltas) @ deltas, project_simplex(lam + step * losses)


@dataclass(kw_only=True)
class AgnosticFL(LossWeighted):
    """``min_w max_lambda sum lambda_k F_k``: ``w <- w + sum lambda_k delta_k``, ``lambda <- Proj(lambda + step F)``,
    ``F`` at the received model, ``lambda`` on the simplex, uniform at the start.

    With a cohort ``lambda`` is renormalised over those that answered, and F estimated as ``num_clients / m`` times
    theirs, 0 elsewhere: unbiased and noisy. ``groups=domain`` has a ``lambda`` per domain, within which clients weigh
    n_k, and is the usable form then; a domain that nobody answered for counts with the mean of the others' losses.
    ``step=0`` is FedAvg with uniform weights (``groups=client``).
    """

    traits: ClassVar[Traits] = Traits(
        asked_only=True,
        counts_clients=True,
        discloses="clients of AFL send their losses, which no noise covers; type strategy=fedavg",
    )
    weighting: str = field(init=False, default="uniform")
    step: float
    groups: str

    def __post_init__(self) -> None:
        check(self.step >= 0, "step", self.step, "must not be negative")
        check(self.groups in GROUPS, "groups", self.groups, f"choose one of {', '.join(GROUPS)}")
        super().__post_init__()

    @property
    def size(self) -> str:
        """Within a domain by samples."""
        return "samples" if self.groups == "domain" else "uniform"

    @property
    def is_fedavg(self) -> bool:
        """``step = 0`` with a weight per client."""
        return self.step == 0 and self.groups == "client"

    def init(self, server: Server) -> State:
        """Adds ``lambda`` (g,), float64, one entry a registered client or a domain; 0 for clients never there."""
        names = self._groups(server)
        lam = torch.zeros(max(names) + 1, dtype=torch.float64)
        there = sorted({names[c] for c in server.clients})
        lam[there] = 1 / len(there)
        return super().init(server) | {"lambda": lam}

    def weigh(self, server: Server, state: State, answers: Answers) -> Tensor:
        """``lambda_k``, or of a domain each client's share by samples."""
        names, lam = self._groups(server), state["lambda"]
        if self.groups == "client":
            return torch.stack([lam[c] for c in answers.clients])
        total = _sums(names, answers, answers.sizes)
        pairs = zip(answers.clients, answers.sizes, strict=True)
        return torch.stack([lam[names[c]] * (n / total[names[c]]) for c, n in pairs])

    def apply(self, state: State, replies: Replies, round: Round, server: Server, answers: Answers) -> State:
        """A step of the model, unless all that answered weigh nothing, and one of ``lambda``."""
        names, lam = self._groups(server), state["lambda"].clone()
        there = sorted({names[c] for c in server.clients})
        losses = torch.zeros_like(lam)
        if self.groups == "client":
            scale = len(there) / len(answers.clients)
            losses[list(answers.clients)] = scale * losses.new_tensor(answers.losses)
        else:
            total = _sums(names, answers, answers.sizes)
            weighed = [n * f for n, f in zip(answers.sizes, answers.losses, strict=True)]
            mean = {g: s / total[g] for g, s in _sums(names, answers, weighed).items()}
            losses[:] = sum(mean.values()) / len(mean)
            losses[list(mean)] = losses.new_tensor(list(mean.values()))
        lam[there] = project_simplex(lam[there] + self.step * losses[there])
        server.log["lambda_max"] = float(lam.max())
        return (self.update(state, replies, round) if len(replies) else state) | {"lambda": lam}

    def _groups(self, server: Server) -> list[int]:
        """The group of every registered client."""
        if self.groups == "client":
            return list(range(len(server.sizes)))
        domains = list(server.client_domains or [None] * len(server.sizes))
        known = sorted({d for d in domains if d is not None})
        missing = [c for c in server.clients if domains[c] is None]
        check(
            not missing,
            "groups",
            "domain",
            f"client {missing[:1]} has no domain; type strategy.groups=client, or data with domains",
        )
        return [0 if d is None else known.index(d) for d in domains]


def _sums(names: list[int], answers: Answers, values: object) -> dict[int, float]:
    """Sums of one number per answer over each group."""
    out: dict[int, float] = {}
    for c, v in zip(answers.clients, values, strict=True):  # type: ignore[call-overload]
        out[names[c]] = out.get(names[c], 0.0) + float(v)
    return out
