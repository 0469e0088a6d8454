"""Spectral normalisation (Miyato et al. 2018) where models are averaged.

The mean of clients' singular vectors belongs to no weights, and is no unit vector. So they do not travel: they follow
from the weights, by power iteration whenever a model is loaded, from the vectors of the model handed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

MOST, ENOUGH = 200, 1e-6  # iterations; relative change of the largest singular value

Normalised = tuple[Callable[[], Tensor], Tensor, Tensor, float]


def normalised(model: nn.Module) -> list[Normalised]:
    """Every spectrally normalised weight: the matrix (n, m) as a function, ``u`` (n,), ``v`` (m,), and epsilon."""
    out: list[Normalised] = []
    for layer in model.modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                out.append(_hooked(layer, hook))
        if is_parametrized(layer):
            for chain in layer.parametrizations.values():  # type: ignore[operator]
                out += [_parametrized(chain, i) for i, m in enumerate(chain) if _iterates(m)]
    return out


def settle(weights: list[Normalised]) -> None:
    """Turn every ``u`` and ``v``, in place, to the first singular vectors of their weight."""
    with torch.no_grad():
        for matrix, u, v, eps in weights:
            m, before = matrix(), 0.0
            for _ in range(MOST):
                F.normalize(m.mT.mv(u), dim=0, eps=eps, out=v)
                image = m.mv(v)
                F.normalize(image, dim=0, eps=eps, out=u)
                now = float(u.dot(image))
                if abs(now - before) <= ENOUGH * now:
                    break
                before = now


def _iterates(m: nn.Module) -> bool:
    return isinstance(m, _SpectralNorm) and "_u" in m._buffers


def _hooked(layer: nn.Module, hook: SpectralNorm) -> Normalised:
    def matrix() -> Tensor:
        return hook.reshape_weight_to_matrix(getattr(layer, f"{hook.name}_orig"))

    return matrix, getattr(layer, f"{hook.name}_u"), getattr(layer, f"{hook.name}_v"), hook.eps


def _parametrized(chain: Any, i: int) -> Normalised:
    norm = chain[i]

    def matrix() -> Tensor:
        names = ["original"] if chain.is_tensor else [f"original{k}" for k in range(chain.ntensors)]
        weights = [getattr(chain, name) for name in names]
        for earlier in list(chain)[:i]:
            weights = [earlier(*weights)]
        return norm._reshape_weight_to_matrix(weights[0])  # type: ignore[no-any-return]

    return matrix, norm._u, norm._v, norm.eps
