"""Error feedback (Stich et al. 2018; Karimireddy et al. 2019): what a frame lost is added to the client's next vector.

x = v + a r,  y = decode(encode(x)),  r <- x - y, with the decay a in [0, 1] of a residual that may be stale.
"""

from __future__ import annotations

from torch import Tensor


def compensated(v: Tensor, r: Tensor | None, decay: float = 1.0) -> Tensor:
    """x = v + a r, in float64; without a residual v."""
    return v.double() if r is None else v.double().add(r.double(), alpha=decay)


def remainder(x: Tensor, y: Tensor) -> Tensor:
    """r = x - y: of what was to be sent, what the receiver does not get; committed with the update only."""
    return x - y
