"""q-FedAvg. Li, Sanjabi, Beirami, Smith: Fair Resource Allocation in Federated Learning, ICLR 2020 (Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from fedsim.errors import StrategyError
from fedsim.exchange.payload import Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import State, check
from strategies.weighed import Answers, LossWeighted, shifted_powers

SMALLEST = 1e-10  # added to losses, as in the authors' code


def qfedavg_weights(losses: Sequence[float], q: float) -> Tensor:
    """``r_k = F_k ** q`` (n,), float64, up to one common factor (see ``shifted_powers``)."""
    return shifted_powers([q * math.log2(loss + SMALLEST) for loss in losses])


def qfedavg_shrink(
    weights: Tensor, losses: Sequence[float], squares: Sequence[float], lr: float, q: float
) -> float:
    """``sum r / sum (r + b)``, by which the mean is shortened: ``b_k = q F_k**(q-1) |delta_k|^2 / lr``.

    ``weights`` (n,) are the ``r_k``, with any common factor; ``squares`` the squared lengths of the updates.
    """
    if lr == 0:  # at the end of a schedule: nobody moved
        return 1.0
    r = weights.tolist()
    b = [v * q * s / (lr * (f + SMALLEST)) for v, f, s in zip(r, losses, squares, strict=True)]
    return float(sum(r) / (sum(r) + sum(b)))


def qfedavg_step(w: Tensor, deltas: Tensor, losses: Tensor, lr: float, q: float) -> Tensor:
    """The next model (d,): ``w + sum r_k delta_k / sum (r_k + b_k)`` of updates (n, d) and losses (n,) at ``w``."""
    if q == 0:
        return w + deltas.mean(0)
    found = losses.tolist()
    r = qfedavg_weights(found, q)
    shrink = qfedavg_shrink(r, found, deltas.double().square().sum(1).tolist(), lr, q)
    return w + (r.to(deltas) @ deltas) / float(r.sum()) * shrink


@dataclass(kw_only=True)
class QFedAvg(LossWeighted):
    """Minimises ``sum_k p_k F_k^(q+1) / (q+1)``: clients with larger losses weigh more.

    ``w <- w + sum_k r_k delta_k / sum_k (r_k + b_k)`` with ``r_k = F_k^q`` and ``b_k = q F_k^(q-1) |delta_k|^2 / lr``,
    which is the authors' ``w - sum Delta_k / sum h_k``. ``q=0`` is FedAvg with the same weighting. ``weighting``:
    ``uniform`` (the paper, with clients sampled by their sizes: ``sampling=weighted``) or ``samples``, which multiplies
    ``r_k`` and ``b_k`` by n_k. The bound ``b`` shortens steps: tune ``client.lr`` for each q.
    """

    traits: ClassVar[Traits] = Traits(
        asked_only=True,
        mean_only="q-FedAvg's step is bounded for the mean; leave aggregator out",
        discloses="clients of q-FedAvg send their losses, which no noise covers; type strategy=fedavg",
    )
    wants_norms = True
    q: float

    def __post_init__(self) -> None:
        check(0 <= self.q <= 15, "q", self.q, "must lie in [0, 15]")
        super().__post_init__()

    @property
    def is_fedavg(self) -> bool:
        """``q = 0``."""
        return self.q == 0

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Also a negative loss."""
        if cast(float, loss := update.values.get("loss", 0.0)) < 0:
            return f"loss={loss!r}: must not be negative, since q-FedAvg raises it to a power"
        return super().objection(asked, update)

    def weigh(self, server: Server, state: State, answers: Answers) -> Tensor:
        """``r_k``, or ``n_k r_k``."""
        for client, loss in zip(answers.clients, answers.losses, strict=True):
            if loss < 0:
                raise StrategyError(
                    f"client {client}: its loss is {loss:.3g}, but q-FedAvg raises losses to a power: they must not be "
                    "negative; take another loss, or strategy=term"
                )
        r = qfedavg_weights(answers.losses, self.q)
        return r * r.new_tensor(answers.sizes)

    def apply(self, state: State, replies: Replies, round: Round, server: Server, answers: Answers) -> State:
        """The mean update, shortened by the bound."""
        if not len(replies):
            return state
        squares = [cast(float, v) for v in replies.values("norm2")]
        shrink = qfedavg_shrink(replies.weights, answers.losses, squares, round.lr, self.q)
        server.log["step_share"] = shrink
        return state | {"w": state["w"] + (self.base.server_lr * shrink) * self.aggregate(replies)}
