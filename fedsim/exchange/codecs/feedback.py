"""Error feedback (Stich et al. 2018; Karimireddy et al. 2019): what a frame lost is added to the client's next vector.

x = v + r,  y = decode(encode(x)),  r <- a (x - y), with the decay a in [0, 1] of a residual that will be stale.
"""

from __future__ import annotations

from torch import Tensor


def compensated(v: Tensor, r: Tensor | None) -> Tensor:
    """x = v + r, in float64; without a residual v."""
    return v.double() if r is None else v.double() + r.double()


def remainder(x: Tensor, y: Tensor, decay: float = 1.0) -> Tensor:
    """r = a (x - y): of what was to be sent, what the receiver does not get; committed with the update only."""
    return (x - y) * decay
