"""Random directions that everybody can draw again, and steps along them.

A direction is named by ``(seed, scope, t, a, b)``: the run's seed; what shares it (``own``, a client; ``shared``, all
clients; ``pool``, all rounds; ``local``, nobody); round, stream and index. Each is a block of its own of one
counter-based generator (Philox, Salmon et al. 2011, from NumPy), so that no two names meet, nothing is kept and no
global generator is touched. Normals are float32 whatever the run's type: float64 draws are another stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.rng import key
from fedsim.task.layout import Slots

GENERATOR = f"Philox4x64-10, standard_normal in float32, of numpy {np.__version__}"
SCOPES = ("own", "shared", "pool", "local")


def generator(seed: int, scope: str, t: int, a: int, b: int) -> np.random.Generator:
    """The generator of one direction: ``seed`` and ``scope`` are the key, ``(t, a, b)`` the upper words of the counter,
    the lowest counts what is drawn (2**64 blocks of four words, more than any model has)."""
    counter = np.array([0, b, a, t], np.uint64)
    return np.random.Generator(np.random.Philox(key=key(seed, f"directions/{scope}"), counter=counter))


@dataclass(frozen=True)
class Directions:
    """The directions of one ``scope`` over the parameters in ``slots``, as vectors (d,) whose padding is 0."""

    seed: int
    scope: str
    slots: Slots

    def draw(self, t: int, a: int, b: int, like: Tensor, out: Tensor | None = None) -> Tensor:
        """``z(t, a, b)`` (d,) in type and on the device of ``like``; into ``out``, if that is given.

        Drawn tensor by tensor, which gives the numbers of one draw of all; padding is passed over.
        """
        plain = like.dtype == torch.float32 and like.device.type == "cpu"
        z = out if plain and out is not None else torch.empty(self.slots.dim)
        numbers, draws = z.numpy(), generator(self.seed, self.scope, t, a, b)
        end = 0
        for run in self.slots.runs:
            numbers[end : run.start] = 0
            draws.standard_normal(dtype=np.float32, out=numbers[run])
            end = run.stop
        numbers[end:] = 0
        if plain:
            return z
        return z.to(like.device, like.dtype) if out is None else out.copy_(z)

    def sphere(self, t: int, a: int, b: int, like: Tensor, out: Tensor | None = None) -> Tensor:
        """``z / |z|``, uniform on the unit sphere."""
        z = self.draw(t, a, b, like, out)
        return z.div_(z.norm())


def nu(K: float, kind: str) -> float:
    """What K contributions are divided by: ``mean``, K, or ``sqrt``."""
    return math.sqrt(K) if kind == "sqrt" else K


def add_scaled(total: Tensor, c: float, z: Tensor) -> None:
    """``total += c z`` in place, ``z`` is consumed: a product, then a sum, each rounded by itself, so that the bits are
    the same on every processor and wherever the vectors lie."""
    total.add_(z.mul_(c))


def update(theta: Tensor, terms: Iterable[tuple[float, Tensor]], scale: float) -> Tensor:
    """``theta - scale sum c z`` (d,), a fresh tensor, of pairs (c, z) as they come; terms with c = 0 are passed over.

    With ``scale = lr / nu(K)`` the end of a round of Just One Byte (arXiv 2306.10015).
    """
    total = torch.zeros_like(theta)
    for c, z in terms:
        if c:
            total.add_(z * c)
    return moved(theta, total, scale)


def moved(theta: Tensor, total: Tensor, scale: float) -> Tensor:
    """``theta - scale total`` (d,), a fresh tensor; ``total`` is consumed."""
    return theta + total.mul_(-scale)
