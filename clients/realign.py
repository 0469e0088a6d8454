"""FedLoGe's second stage, GLA-FR: class norms of linear heads set right in closed form (ICLR 2024, eq. 6 and 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def realign_global(weight: Any, *, scale: float = 1.7) -> Tensor:
    """Rows of the global head (..., C, d) set to length ``scale``, so that no class wins by its norm.

    The bias stays; ``scale`` counts only against it. A row of zeros stays zero.
    """
    rows = _floating(weight)
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows * (scale / lengths.clamp_min(1e-12))


def realign_local(local_weight: Any, global_weight: Any) -> Tensor:
    """Rows of the global head (..., C, d) times the lengths of a client's own rows, a soft prior of its classes.

    The global rows keep their own lengths, as in the authors' code.
    """
    lengths: Tensor = _floating(local_weight).norm(dim=-1, keepdim=True)
    return lengths * _floating(global_weight)


def _floating(value: Any) -> Tensor:
    t = torch.as_tensor(value)
    return t if t.is_floating_point() else t.to(torch.get_default_dtype())
