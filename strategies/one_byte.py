"""Just One Byte (per gradient): fine-tuning without backpropagation over a thin link. Zelikman, Huang, Liang, Haber,
Goodman: Just One Byte (per gradient), arXiv 2306.10015, 2023.

The parts are plain functions, usable without the simulator: ``encode`` and ``decode``, ``direction``, ``slope``,
``nu``, ``update``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from clients.codec import CODECS, Codes, Floats
from clients.directions import generator, moved, nu, update
from clients.frames import Heard
from clients.one_byte import OneByteClient, advanced, scale
from clients.slopes import slope
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import check
from strategies.replicas import Logged

__all__ = ["OneByte", "decode", "direction", "encode", "nu", "slope", "update"]


def encode(g: ArrayLike, codec: str = "log8") -> Codes:
    """Codes of slopes ``g``, any shape; what is not finite is 0."""
    return CODECS[codec].encode(g)


def decode(b: ArrayLike, codec: str = "log8") -> Floats:
    """Values of codes ``b``, float64."""
    return CODECS[codec].decode(np.asarray(b))


def direction(seed: int, t: int, m: int, s: int, size: int) -> np.ndarray:
    """``z(t, m, s)`` (size,), float32 standard normal: what a model of so many trainable numbers draws."""
    return generator(seed, "own", t, m, s).standard_normal(size, dtype=np.float32)


@dataclass(kw_only=True)
class OneByte(Logged):
    """Each client measures S = ``samples`` slopes a round, each a byte (``codec``); all copies move by
    ``theta <- theta - (lr / nu(K)) sum decode(b) z(t, m, s)``, K the number of slopes that arrived. A client answers a
    question once, with all S in their order, and answers are taken in order of clients: no entry can come twice, and
    the order of arrival does not matter.

    ``nu``: ``mean`` (K) or ``sqrt``. ``batch``: a new mini-batch for each ``direction``, or one for the ``round``.
    ``weighting=samples``: a direction weighs n_m (and n_m travels with the log, four bytes).
    """

    traits: ClassVar[Traits] = replace(
        Logged.traits,
        client_by_client=True,
        mean_only="slopes of One Byte's clients lie along directions of their own: no rule compares them; leave it "
        "out, or type strategy=decomfl, whose clients share directions",
    )
    fold: ClassVar[Fold] = {"sums": "sum"}
    samples: int
    batch: str
    nu: str

    def make_client(self) -> OneByteClient:
        """A client that measures along directions of its own."""
        check(self.samples >= 1, "samples", self.samples, "directions a client and round, at least 1")
        check(self.batch in ("direction", "round"), "batch", self.batch, "choose one of direction, round")
        check(self.nu in ("mean", "sqrt"), "nu", self.nu, "choose one of mean, sqrt")
        return OneByteClient(
            lr=self.lr,
            eps=self.eps,
            codec=self.codec,
            measure=self.measure,
            samples=self.samples,
            batch=self.batch,
            weighting=self.weighting,
            nu=self.nu,
        )

    @property
    def heard(self) -> int:
        """S."""
        return self.samples

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Anything but S codes."""
        return self.misfit(update, self.samples) if asked.task == "fit" else ""

    def advance(
        self, server: Server, w: Tensor, replies: Replies, round: Round
    ) -> tuple[Tensor, Sequence[bytes]]:
        """The step along all directions: of the clients' own sums, or where these lie elsewhere, drawn again."""
        parts = [self._part(server, o.client, o.values) for o in replies.ok]
        framing = self.rule.framing(len(server.sizes))
        frame = framing.head([p.client for p in parts]), framing.body(parts)
        lr = self.rule.rate(server.local, round.index)
        if server.remote or not parts:
            return advanced(w, parts, round.index, self.rule, server.seed, server.layout, lr), frame
        return moved(w, replies.total("sums"), scale(parts, self.samples, lr, self.nu)), frame

    def wire(self, frames: Sequence[Sequence[bytes]], registered: int) -> dict[str, bytes]:
        """The codes alone where everybody registered took part in every round, else also who did."""
        whole = registered * self.rule.framing(registered).each
        if all(len(body) == whole for _, body in frames):
            return {"log": b"".join(body for _, body in frames)} if frames else {}
        return {"log_of_some": b"".join(head + body for head, body in frames)}

    def _part(self, server: Server, client: int, values: Mapping[str, Any]) -> Heard:
        n = int(server.sizes[client]) if self.weighting == "samples" else 1
        return Heard(client, values["slopes"], n)
