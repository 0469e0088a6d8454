"""Analytic federated learning: the ridge classifier of all clients' features, exactly, in one exchange. He, Tang, Fang,
Xu, et al.: AFL, CVPR 2025."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from clients.ridge import RidgeClient, unpacked
from fedsim.errors import ConfigError, StrategyError, TooFewUpdates
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from fedsim.task.heads import HeadSlots
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.threads import one_thread
from strategies.base import State, Strategy, check, miscounted

log = logging.getLogger(__name__)

SUMS = {"gram": "sum", "cross": "sum"}
EPS = torch.finfo(torch.float64).eps
SMALL = (
    1e-7,
    1e4,
)  # a pivot that is so small a share of what it was is rounding in most digits; or so many times eps


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float, eps: float = EPS) -> Tensor:
    """``W = (X'X + ridge I)^-1 X'Y`` (d, C) by Cholesky.

    Where its pivots tell rounding from features no more (dependent features of a large scale), in the directions that
    ``gram`` has beyond rounding: in the others ``cross`` is 0, and so is the solution. ``eps``: of the numbers sent.

    Raises:
        StrategyError: without ridge, if there is no single solution; with the rank.
        TooFewUpdates: with ridge, if ``gram`` can be no samples' X'X: somebody sent something else.
    """
    whole = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    factor, info = torch.linalg.cholesky_ex(whole)
    small = max(SMALL[0], SMALL[1] * eps)
    if not int(info) and bool((factor.diagonal().square() > small * whole.diagonal()).all()):
        return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(gram)
    bound = float(values[-1].clamp(min=0)) * eps * len(gram)
    real = values > bound
    if ridge > 0 and bool((values < -bound).any()):
        raise TooFewUpdates("the sum of the clients' X'X is none of any samples: what some sent is no X'X")
    if ridge == 0 and not bool(real.all()):
        raise StrategyError(
            f"strategy.ridge=0: the features of all clients have rank {int(real.sum())} of {len(gram)}, so there is no "
            "single solution; type strategy.ridge=1"
        )
    basis = vectors[:, real]
    W: Tensor = basis @ ((basis.mT @ cross) / (values[real] + ridge)[:, None])
    return W


def joined(C: Sequence[Tensor], W: Sequence[Tensor], gamma: float) -> tuple[Tensor, Tensor]:
    """``X'X`` and ``X'Y`` of all clients from their messages: ``sum C_k - K gamma I`` and ``sum C_k W_k``."""
    gram = torch.stack(list(C)).sum(dim=0)
    cross = torch.stack([c @ w for c, w in zip(C, W, strict=True)]).sum(dim=0)
    return gram - len(C) * gamma * torch.eye(len(gram), dtype=gram.dtype), cross


def pairwise(C: Sequence[Tensor], W: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The published form, client after client: ``(C, W)`` still with K gamma; for comparison, ``joined`` is exacter.

    ``W_uv = (I - R_u C_v + R_u C_v (C_u + C_v)^-1 C_v) W_u + (u and v exchanged) W_v``, ``R = C^-1``.
    """
    (c, w), eye = (C[0], W[0]), torch.eye(len(C[0]), dtype=C[0].dtype)
    for c_v, w_v in zip(C[1:], W[1:], strict=True):
        whole = torch.linalg.inv(c + c_v)
        mine, theirs = torch.linalg.inv(c) @ c_v, torch.linalg.inv(c_v) @ c
        w = (eye - mine + mine @ whole @ c_v) @ w + (eye - theirs + theirs @ whole @ c) @ w_v
        c = c + c_v
    return c, w


@dataclass(kw_only=True)
class Analytic(Strategy):
    """The head is the ridge solution over all clients' features; the body stays what it was at the start.

    Clients are asked once; who was not there is asked again in later rounds, and added. Whatever the split: the
    solution of all samples of those who came.

    Args:
        send: ``moments`` (X'X, X'Y) | ``solution`` (C_k, W_k), the paper's message; the same result.
        gamma: regularisation of the clients' own solutions, taken out again by the server.
        ridge: of the result; 0 only if there is a single solution.
        bias: whether features get a 1 at the end; the model's head must have one.
        balance: ``none`` | ``class``: rows weigh N / (C N_c), which costs an exchange of class counts.
        numbers: ``float64`` | ``float32``, of what is sent.
    """

    traits: ClassVar[Traits] = Traits(
        everybody=True,
        disjoint=True,
        asked_only=True,
        labels=True,
        features=True,
        linear_head=True,
        mean_only="sums are not averaged; leave it out",
        discloses="clients send sums of products of their features, which no bound on a model's change covers; type "
        "strategy=fedavg or another method of the table in docs/privacy.md",
        unread={"gamma": ("send", ("moments",))},
    )
    fold: ClassVar[Fold] = SUMS
    statistics: ClassVar[frozenset[str]] = frozenset(SUMS)
    send: str
    gamma: float
    ridge: float
    bias: bool
    balance: str
    numbers: str
    client: RidgeClient = field(init=False)

    def __post_init__(self) -> None:
        for name, known in (
            ("send", ("moments", "solution")),
            ("balance", ("none", "class")),
            ("numbers", ("float64", "float32")),
        ):
            check((value := getattr(self, name)) in known, name, value, f"choose one of {', '.join(known)}")
        check(self.gamma > 0, "gamma", self.gamma, "must be positive")
        check(self.ridge >= 0, "ridge", self.ridge, "must not be negative")
        self.client = RidgeClient(send=self.send, gamma=self.gamma, bias=self.bias, numbers=self.numbers)

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a bias that the head cannot hold."""
        if self.bias and HeadSlots.of(layout).bias is None:
            raise ConfigError("strategy.bias=true: the model's head has none; type strategy.bias=false")

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Counts that are none, and moments that no samples have."""
        gram = update.arrays.get("gram")
        if gram is not None and bool((unpacked(gram).diagonal() < 0).any()):
            return "'gram' has negative entries on its diagonal, expected sums of squares"
        return miscounted("counts", asked, update)

    def round(self, server: Server, state: State, round: Round) -> State:
        """Ask those who have not answered yet, add what they send, solve."""
        known = state.get("analytic/known")
        missing = [c for c in round.cohort if known is None or not known[c]]
        if not missing:
            return state
        late = "analytic/counts" in state
        state = self._counted(server, state, missing)
        replies = server.exchange(self._asking(server, state), self._fold(), clients=missing)
        if not len(replies):
            return state
        if late:
            log.warning(
                "strategy.balance=class: rows of clients %s, who come late, weigh by the class counts of those who "
                "were there first",
                ", ".join(map(str, replies.clients)),
            )
        with one_thread():
            return self._solved(server, state, replies)

    def _fold(self) -> dict[str, str]:
        return SUMS if self.send == "moments" else dict.fromkeys(SUMS, "stack")

    def _counted(self, server: Server, state: State, clients: Sequence[int]) -> State:
        """With class counts, where rows are weighed by them: of those who were there first."""
        if self.balance == "none" or "analytic/counts" in state:
            return state
        with server.apart("class_counts"):
            replies = server.exchange(Message(), {"counts": "sum"}, task="counts", clients=clients)
        return state | {"analytic/counts": replies.total("counts")} if len(replies) else state

    def _asking(self, server: Server, state: State) -> Message:
        arrays = {"w": server.start.w} | ({"buffers": server.start.buffers} if len(state["buffers"]) else {})
        if (counts := state.get("analytic/counts")) is not None:
            arrays["balance"] = counts.sum() / (server.workshop.num_classes * counts.clamp(min=1))
        return Message.of(arrays, {"classes": HeadSlots.of(server.layout).shape[0]})

    def _solved(self, server: Server, state: State, replies: Replies) -> State:
        slots = HeadSlots.of(server.layout)
        classes, _ = slots.shape
        if self.send == "moments":
            gram = unpacked(replies.total("gram").double())
            cross = replies.total("cross").double().view(-1, classes)
        else:
            C = [unpacked(v.double()) for v in replies.stack("gram")]
            W = [v.double().view(-1, classes) for v in replies.stack("cross")]
            gram, cross = joined(C, W, self.gamma)
        if "analytic/gram" in state:
            gram, cross = gram + state["analytic/gram"], cross + state["analytic/cross"]
        known = state.get("analytic/known", torch.zeros(len(server.sizes), dtype=torch.float64)).clone()
        known[replies.clients] = 1
        server.log["clients_in"] = int(known.sum())
        W_all = ridge_solution(gram, cross, self.ridge, torch.finfo(getattr(torch, self.numbers)).eps)
        w = state["w"].clone()
        body = W_all[:-1] if self.bias else W_all
        named = server.layout.named(w)
        named[slots.weight.name].copy_(body.mT)
        if slots.bias is not None:
            named[slots.bias.name].copy_(W_all[-1]) if self.bias else named[slots.bias.name].zero_()
        return state | {
            "w": w,
            "analytic/gram": gram,
            "analytic/cross": cross,
            "analytic/known": known,
        }
