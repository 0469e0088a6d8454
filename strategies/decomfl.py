"""DeComFL. Li, Ying, Liu, Dong, Yang: Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order
Optimization, arXiv 2405.15861, 2024. And MeZO, which is the same with one client: Malladi et al., Fine-Tuning Language
Models with Just Forward Passes, arXiv 2305.17333, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from clients.codec import CODECS
from clients.decomfl import DeComFLClient
from fedsim.exchange.payload import Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import check
from strategies.replicas import Logged


@dataclass(kw_only=True)
class DeComFL(Logged):
    """K = ``local_steps`` steps a round, each along P = ``directions`` directions that all clients share; the server
    averages the slopes, ``theta <- theta - (lr / P) sum_j mean_i(c_i[k, j]) z(t, k, j)`` for k in order, and sends the
    means of missed rounds.

    An aggregator rules over the slopes (K P numbers a client): they lie along the same directions.
    """

    local_steps: int
    directions: int

    def make_client(self) -> DeComFLClient:
        """A client that steps along the shared directions."""
        check(self.local_steps >= 1, "local_steps", self.local_steps, "must be at least 1")
        check(self.directions >= 1, "directions", self.directions, "must be at least 1")
        return DeComFLClient(
            lr=self.lr,
            eps=self.eps,
            codec=self.codec,
            measure=self.measure,
            local_steps=self.local_steps,
            directions=self.directions,
        )

    @property
    def heard(self) -> int:
        """K P."""
        return self.local_steps * self.directions

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Anything but K P codes."""
        return self.misfit(update, self.heard) if asked.task == "fit" else ""

    def advance(
        self, server: Server, w: Tensor, replies: Replies, round: Round
    ) -> tuple[Tensor, Sequence[bytes]]:
        """K steps along the mean slopes, as they travel."""
        codec = CODECS[self.codec]
        if not len(replies):
            return w, [codec.pack(codec.nothing(self.heard))]
        rows = [
            torch.from_numpy(codec.decode(c))
            for o in replies.ok
            if (c := self.codes(o, self.heard)) is not None
        ]
        n = [server.sizes[c] if self.weighting == "samples" else 1 for c in replies.clients]
        mean = self.aggregator(torch.stack(rows), torch.tensor(n, dtype=torch.float64))
        frame = codec.pack(codec.encode(mean.numpy()))
        lr = self.rule.rate(server.local, round.index)
        return self.rule.advanced(w, frame, round.index, server.seed, server.layout, lr), [frame]

    def wire(self, frames: Sequence[Sequence[bytes]], registered: int) -> dict[str, bytes]:
        """Frames end to end."""
        return {"log": b"".join(frame for (frame,) in frames)} if frames else {}


@dataclass(kw_only=True)
class MeZO(DeComFL):
    """Zeroth-order SGD on all samples in one place; a round is ``local_steps`` steps."""

    traits: ClassVar[Traits] = replace(
        DeComFL.traits,
        pooled=True,
        mean_only="all samples lie in one place, so there is one update; leave it out",
    )
