"""HeteroFL. Diao, Ding, Tarokh: HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
Clients, ICLR 2021 (section 3)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from clients.base import Client
from clients.heterofl import HeteroFLClient
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from fedsim.task.heads import HeadSlots
from fedsim.task.submodels import narrow
from strategies.base import State, Strategy, check, check_weighting


@dataclass(kw_only=True)
class HeteroFL(Strategy):
    """Every parameter becomes the mean over the clients whose sub-model holds it; the others keep their value.

    A client's width is that of its class (``client.classes``). One exchange per width, side by side in virtual time.
    ``output_rows``: who counts in a class's row of the head: the clients that hold it (``width``), or of these only
    those with samples of the class (``classes``, the authors' code).
    """

    traits: ClassVar[Traits] = Traits(
        asked_only=True,
        widths=True,
        over_selection=False,
        discloses="HeteroFL sums clients by the width of their models, a sum each; type strategy=fedavg",
        mean_only="parts of models can only be averaged; leave the aggregator at mean",
    )
    caches: ClassVar[frozenset[str]] = frozenset({"places"})  # follow from the model
    server_lr: float
    weighting: str
    scale: bool
    mask: bool
    output_rows: str = "width"
    client: Client = field(init=False)
    places: dict[float, Tensor] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check(self.server_lr > 0, "server_lr", self.server_lr, "must be positive")
        check_weighting(self.weighting)
        wanted = "choose one of width, classes"
        check(self.output_rows in ("width", "classes"), "output_rows", self.output_rows, wanted)
        by_class = self.output_rows == "classes"
        self.traits = replace(self.traits, labels=by_class, linear_head=by_class)  # type: ignore[misc]
        self.client = HeteroFLClient(
            weighting=self.weighting, scale=self.scale, mask=self.mask, output_rows=self.output_rows
        )

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """Mean updates, and with ``output_rows=classes`` the share of clients that have each class."""
        return {"delta": "mean"} | ({"classes": "mean"} if self.output_rows == "classes" else {})

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Classes that are neither there nor not."""
        has = update.arrays.get("classes")
        wrong = has is not None and not bool(((has == 0) | (has == 1)).all())
        return "'classes' holds other numbers than 0 and 1" if wrong else ""

    def round(self, server: Server, state: State, round: Round) -> State:
        """Send each width its part of the model, and average every parameter over those who had it."""
        total, weight, longest = torch.zeros_like(state["w"]), torch.zeros_like(state["w"]), 0.0
        for width, clients in _by_width(server, round).items():
            places = self._places(server, width)
            message = Message.of({"w": state["w"][places]}, {"width": width})
            replies = server.exchange(message, self.fold, clients=clients, wait=False)
            longest = max(longest, replies.sim_seconds)
            if len(replies):
                amount = float(replies.weights.sum())
                total[places] += amount * replies.mean("delta")
                weight[places] += amount * self._share(server, replies, places)
        if server.clock is not None:
            server.clock.elapse(longest)
        return state | {"w": state["w"] + self.server_lr * total / weight.clamp(min=1e-30)}

    def _share(self, server: Server, replies: Replies, places: Tensor) -> Tensor | float:
        """The share of a width's clients that count in each of its parameters (d_sub,)."""
        if self.output_rows == "width":
            return 1.0
        classes = replies.mean("classes")
        whole, head = classes.new_ones(server.layout.dim), HeadSlots.of(server.layout)
        for slot in filter(None, (head.weight, head.bias)):
            whole[slot.span] = classes.repeat_interleave(math.prod(slot.shape[1:]))
        return whole[places]

    def _places(self, server: Server, width: float) -> Tensor:
        if width not in self.places:
            example = server.task.example
            assert example is not None
            whole = copy.deepcopy(server.task.model).to(server.dtype)
            self.places[width] = narrow(whole, width, example, run=server.task.output)[1]
        return self.places[width]


def _by_width(server: Server, round: Round) -> dict[float, list[int]]:
    """The cohort by width, the widest first."""
    out: dict[float, list[int]] = {}
    for c in round.cohort:
        out.setdefault(server.kinds.width(c) if server.kinds else 1.0, []).append(c)
    return dict(sorted(out.items(), reverse=True))
