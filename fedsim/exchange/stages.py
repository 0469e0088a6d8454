"""What the release asks of its stages: a codec, and the fixed point of secure sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from fedsim.exchange.codecs import FrameCodec
    from fedsim.exchange.normals import Draws
    from fedsim.exchange.payload import Value
    from fedsim.exchange.secagg import LegBytes
    from fedsim.task.layout import Layout


class Codec(Protocol):
    """Makes a vector shorter on the wire. Pure: the same input and draws give the same bits anywhere."""

    unbiased: bool  # the mean over draws of what is decoded is the vector
    lengthens: bool  # what is decoded may be longer than the vector
    linear: bool  # what it decodes are the entries at places that the key alone says: passes secure sums
    shared: bool  # one draw for all clients of an exchange
    feedback: bool  # what was left out is added to the client's next vector
    feedback_decay: float  # factor in [0, 1] on what was left out
    downlink: FrameCodec | None  # what the model is sent to clients by: see ``fedsim.exchange.downlink``
    standing: bool  # it sends what the model is away from the one that clients hold

    def takes(self, vector: str) -> bool:
        """Whether vectors of this name are encoded; others travel as they are."""

    def encode(self, v: Tensor, draws: Draws, layout: Layout | None) -> Tensor:
        """The frame (n,), uint8, of ``v`` (d,), float64; ``layout`` where ``v`` is one of a model's, else None."""

    def decode(self, frame: Tensor, draws: Draws, layout: Layout | None, d: int | None = None) -> Tensor:
        """What the frame stands for, (d,), float64.

        Raises:
            ClientError: for a frame that no encoder makes.
        """

    def support(self, d: int, draws: Draws) -> Tensor | None:
        """Of a linear codec, the places (k,), ascending, of ``d`` entries that are not zero; None: all of them."""

    def flat(self, v: Tensor, draws: Draws) -> Tensor:
        """Of a linear codec, ``v`` (d,) as n numbers of like size, by which it enters secure sums."""

    def unflat(self, r: Tensor, draws: Draws, d: int) -> Tensor:
        """The inverse of ``flat``, (d,)."""

    def flat_size(self, d: int) -> int:
        """How many numbers ``flat`` makes of ``d``; 0: it changes nothing."""

    def shrink(self, frame: Tensor, factor: float, layout: Layout | None) -> Tensor:
        """The frame of what is decoded times ``factor`` < 1: its scale fields are smaller, its codes the same."""

    def encode_down(self, v: Tensor, draws: Draws, layout: Layout | None = None) -> Tensor:
        """The frame of a model that is sent to clients, or of what it moved by."""

    def decode_down(self, frame: Tensor, draws: Draws, d: int, layout: Layout | None = None) -> Tensor:
        """What clients start from, or move their model by."""


class Ring(Protocol):
    """Fixed-point numbers, whose sums do not depend on their order and can be masked."""

    def enter(
        self,
        vector: str,
        v: Tensor,
        bound: float | None,
        draws: Draws,
        factor: float,
        noise: Tensor | None = None,
        spread: float = 0.0,
        flat: bool = False,
    ) -> tuple[Tensor, int]:
        """``v`` (d,), float64, times ``factor`` as integers (d,), int64; and how many were beyond reach.
        ``bound``: of its length, where it was clipped; ``noise`` (d,), if any, of deviation ``spread``; ``flat``: the
        entries are of like size."""

    def leave(
        self, vector: str, total: Tensor, bound: float | None, spread: float = 0.0, flat: bool = False
    ) -> Tensor:
        """The real sum (d,), float64, of which the sum of integers is ``total``."""

    masks: bool  # clients mask what they send
    neighbours: int | None  # that each masks with; None: all
    max_weight: float | None  # of a client in a mean

    def factor(self, vector: str, weight: float, said: Mapping[str, Value]) -> float:
        """What a client's vector is multiplied by, by its weight and the message's values."""

    def frame(self, levels: Tensor) -> Tensor:
        """Integers (d,) as they travel, uint8."""

    def opened(self, frame: Tensor, d: int) -> Tensor:
        """The inverse of ``frame``."""

    def hidden(self, said: Mapping[str, Value]) -> bool:
        """Whether clients' weights travel in fixed point, by the message's values."""

    def share(self, weight: float, said: Mapping[str, Value]) -> Tensor:
        """A weight in fixed point, (1,)."""

    def count(self, vector: str, v: Tensor) -> Tensor:
        """Whole numbers as they enter the sum, int64: refused where they are too large for it."""

    def counts(self, total: Tensor) -> Tensor:
        """The sum of whole numbers, int64, of which the sum modulo R is ``total``."""

    def bit(self, one: bool) -> Tensor:
        """A bit in fixed point, (1,)."""

    def denominator(
        self, vector: str, weights: Sequence[float], said: Mapping[str, Value], total: Tensor | None = None
    ) -> float:
        """What the sum of a vector is divided by for its mean."""

    def enough(self, asked: int) -> int:
        """How many of ``asked`` clients must answer."""

    def legs(self, asked: int) -> LegBytes:
        """Bytes of one client beyond the message and the frame."""
