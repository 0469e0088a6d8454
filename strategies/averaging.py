"""Averaging models without losing their variance. "Vanishing Variance Problem in Fully Decentralized Neural-Network
Systems", arXiv 2404.04616: the mean of uncorrelated networks has smaller weights than any of them, so each averaged
tensor is stretched around its mean to the variance its ingredients had.

Two forms of one rule: ``variance_corrected_average`` for one peer and models by name, ``mix`` for all peers at once
on stacked flat vectors (N, d).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.errors import TooFewUpdates
from fedsim.task.layout import Slot
from strategies.aggregators import Aggregator

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TARGETS = ("received", "row", "self")
TINY = 1e-30  # below this a variance says nothing: fresh biases, constant tensors, w averaged with -w
BLOCK = 1 << 21  # entries worked on at once: a few MiB, so that passes over a tensor stay near the caches
Array = NDArray[np.floating]
Floats = NDArray[np.float64]
Model = Mapping[str, Tensor]


@dataclass(frozen=True)
class Correction:
    """The options of the variance correction; refuses impossible ones with ``ValueError``.

    ``target``: whose variance an averaged tensor gets: the mean over the ``received`` models, over the ``row`` of the
    mixing matrix (own included, weighted), or the peer's own (``self``). ``scope``: which tensors are corrected:
    ``matrices`` (two or more dimensions), ``all`` (more than one entry), or a regular expression searched in names.
    ``eps`` is added to both variances. ``strength`` a: the factor f becomes ``1 + a (f - 1)``; 0 is the plain average.
    """

    target: str = "received"
    scope: str = "matrices"
    eps: float = 0.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target={self.target!r}: choose one of {', '.join(TARGETS)}")
        if not self.eps >= 0:
            raise ValueError(f"eps={self.eps}: must not be negative")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(
                f"strength={self.strength}: must be a number from 0 (plain average) on; 1 is exact"
            )
        try:
            re.compile(self.scope)
        except re.error as e:
            raise ValueError(
                f"scope={self.scope!r}: is neither matrices nor all, nor a regular expression ({e})"
            ) from None

    def covers(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the tensor ``name`` of this ``shape`` is corrected; one with a single entry never is."""
        if int(np.prod(shape)) <= 1:
            return False
        if self.scope in ("matrices", "all"):
            return self.scope == "all" or len(shape) >= 2
        return re.search(self.scope, name) is not None

    def factor(self, wanted: Array, found: Array) -> Array:
        """What deviations from the mean are multiplied by, for variances ``wanted`` and ``found`` (any shape)."""
        usable = (wanted > TINY) & (found > TINY)
        ratio = (wanted + self.eps) / np.where(usable, found + self.eps, 1.0)
        return np.where(usable, 1.0 + self.strength * (np.sqrt(ratio) - 1.0), 1.0)


def variance_corrected_average(
    own: Model,
    received: Sequence[Model],
    *,
    own_weight: float = 0.5,
    weights: Sequence[float] | Tensor | None = None,
    target: str = "received",
    scope: str = "matrices",
    eps: float = 0.0,
    strength: float = 1.0,
    bn_stats: str = "local",
) -> dict[str, Tensor]:
    """One peer's model after a mix: ``m = W_ii w_i + sum_j W_ij w_j``, each tensor stretched to its target variance,
    ``mean(m) + (m - mean(m)) sqrt(tau2 / var(m))``.

    Args:
        own: tensors by name (a state dict).
        received: the models that arrived (n of them), same names and shapes. None arrived: a copy of ``own``.
        own_weight: W_ii in [0, 1].
        weights: of the received models (n,), shared out over ``1 - own_weight``; default: equal. Or the whole row of a
            mixing matrix (n + 1,), the own weight first, instead of ``own_weight``.
        target, scope, eps, strength: see ``Correction``. ``strength=0`` is the plain average.
        bn_stats: ``local`` keeps the own running statistics of BatchNorm (told by their names), ``average`` mixes them;
            they are never corrected.

    Returns:
        A new dict of fresh tensors in the types of ``own``. Integer tensors (counters) are the own ones. Statistics
        are taken in two passes, in float32 at least.

    Raises:
        ValueError: for impossible options, or a model whose names or shapes differ, which is named.
    """
    correction = Correction(target, scope, eps, strength)
    if bn_stats not in ("local", "average"):
        raise ValueError(f"bn_stats={bn_stats!r}: choose one of local, average")
    _check_models(own, received)
    share = _shares(len(received), own_weight, weights)
    out: dict[str, Tensor] = {}
    for name, tensor in own.items():
        statistic = name.rpartition(".")[2] in ("running_mean", "running_var")
        if not received or not tensor.is_floating_point() or (statistic and bn_stats == "local"):
            out[name] = tensor.detach().clone()
            continue
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        models = torch.stack([_flat(m[name], tensor.device, dtype) for m in (own, *received)])
        mixed = share.to(models) @ models
        if not statistic and correction.covers(name, tensor.shape):
            mixed = _stretch(mixed, models, share, correction)
        out[name] = mixed.view(tensor.shape).to(tensor.dtype)
    return out


def _flat(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return t.detach().to(device, dtype).reshape(-1)


def _stretch(mixed: Tensor, models: Tensor, share: Tensor, correction: Correction) -> Tensor:
    """``mixed`` (P,) with its target variance; ``models`` (n + 1, P), the own one first, ``share`` (n + 1,)."""
    variances = models.var(dim=1, correction=0).double().cpu()
    wanted = {"self": variances[0], "received": variances[1:].mean(), "row": share @ variances}
    found = mixed.var(correction=0).double().cpu()
    factor = float(correction.factor(wanted[correction.target].numpy(), found.numpy()))
    mean = mixed.mean()
    return mixed if factor == 1.0 else mean + (mixed - mean) * factor


def _shares(n: int, own_weight: float, weights: Sequence[float] | Tensor | None) -> Tensor:
    """Row of the mixing matrix (n + 1,) float64, the own weight first; sums to 1."""
    if not 0 <= own_weight <= 1:
        raise ValueError(f"own_weight={own_weight}: must be in [0, 1]")
    given = torch.as_tensor([1.0] * n if weights is None else weights, dtype=torch.float64).detach().cpu()
    whole = given.shape == (n + 1,)
    possible = bool((given >= 0).all()) and 0 < float(given.sum()) < float("inf")
    if not (whole or given.shape == (n,)) or not (possible or (n == 0 and not whole)):
        raise ValueError(
            f"weights: expected {n} non-negative numbers with a positive sum, one per received model "
            f"(or {n + 1}, the own weight first), got {given.tolist()}"
        )
    given = given / given.sum() if len(given) else given
    if not whole:
        return torch.cat([torch.tensor([float(own_weight)], dtype=torch.float64), given * (1 - own_weight)])
    if own_weight not in (0.5, float(given[0])):
        raise ValueError(
            f"own_weight={own_weight} contradicts weights[0]={float(given[0])}; give one of them"
        )
    return given


def _check_models(own: Model, received: Sequence[Model]) -> None:
    for i, model in enumerate(received):
        if set(model) != set(own):
            names = ", ".join(sorted(set(own) ^ set(model)))
            raise ValueError(f"received[{i}] and the own model differ in the tensors {names}")
        for name, tensor in own.items():
            if model[name].shape != tensor.shape:
                raise ValueError(
                    f"received[{i}]: '{name}' has shape {tuple(model[name].shape)}, expected {tuple(tensor.shape)}"
                )


# -- stacked form -------------------------------------------------------------------------------------------------


def variances(models: Array, slots: Sequence[Slot]) -> NDArray[np.float64]:
    """Variance of every tensor of every model, (N, d) to (N, L) float64: what a sender ships with its model."""
    out = np.empty((len(models), len(slots)))
    for k, slot in enumerate(slots):
        for rows in _row_blocks(len(models), slot.numel):
            part = models[rows, slot.span]
            part = part - part.mean(axis=1, keepdims=True)
            out[rows, k] = np.square(part, out=part).mean(axis=1)
    return out


def mix(
    own: Array,
    pool: Array,
    own_weights: NDArray[np.float64],
    weights: csr_array,
    counts: csr_array,
    slots: Sequence[Slot],
    correction: Correction | None = None,
    *,
    own_variances: NDArray[np.float64] | None = None,
    pool_variances: NDArray[np.float64] | None = None,
    rule: Aggregator | None = None,
) -> dict[int, str]:
    """Mix and correct ``own`` (k, d), the models of k receivers, in place.

    ``pool`` (S, d) holds the models they received; it may be ``own`` itself. ``weights`` (k, S) says what each receiver
    gives each of them, ``own_weights`` (k,) what it gives its own; together a row sums to 1. ``counts`` (k, S) says how
    often a model was received: the target ``received`` is the mean over messages. Variances (., L) come from
    ``variances``, or are computed here. A row without messages stays as it is. One sparse-dense product per block of
    columns, then one pass for the statistics and one to scale; sums have one order whatever computes elsewhere.
    ``rule`` aggregates what arrived in place of the weighted mean: ``m = w_i + (1 - W_ii) rule({w_j - w_i})``. Rows of
    receivers that got too few models for it stay as they are; they are returned, each with what the rule said.
    """
    wanted, short = None, dict[int, str]()
    if correction is not None:
        mine = variances(own, slots) if own_variances is None else own_variances
        if pool_variances is None:
            pool_variances = mine if pool is own else variances(pool, slots)
        wanted = _wanted(correction.target, own_weights, weights, counts, mine, pool_variances)
    heard = np.diff(counts.indptr) > 0
    if rule is not None:
        short = _mix_by(rule, own, pool.copy() if pool is own else pool, own_weights, weights, counts)
        heard[list(short)] = False
    else:
        matrix, keep = weights.astype(own.dtype), own_weights.astype(own.dtype)[:, None]
        width = max(1, BLOCK // max(1, len(pool)))
        for start in range(0, own.shape[1], width):
            columns = slice(start, start + width)
            mixed = own[:, columns] * keep
            mixed += matrix @ np.ascontiguousarray(pool[:, columns])
            own[heard, columns] = mixed[heard]
    if correction is not None and wanted is not None:
        for k, slot in enumerate(slots):
            if correction.covers(slot.name, slot.shape):
                _scale(own, slot, np.where(heard, wanted[:, k], 0.0), correction)
    return short


def _mix_by(
    rule: Aggregator,
    own: Array,
    pool: Array,
    own_weights: NDArray[np.float64],
    weights: csr_array,
    counts: csr_array,
) -> dict[int, str]:
    """``mix`` under a rule of ``strategies.aggregators``, receiver by receiver; ``pool`` is not ``own``.

    The rule sees differences from the receiver's model, as updates of a server's clients are differences from its.
    """
    short = dict[int, str]()
    for i in np.flatnonzero((np.diff(counts.indptr) > 0) & (own_weights < 1)):
        here = slice(counts.indptr[i], counts.indptr[i + 1])
        times = counts.data[here].astype(int)
        senders, share = (np.repeat(v, times) for v in (counts.indices[here], weights.data[here] / times))
        try:
            step = rule(torch.from_numpy(pool[senders] - own[i]), torch.from_numpy(share))
        except TooFewUpdates as thin:
            short[int(i)] = str(thin)
            continue
        own[i] += own.dtype.type(1 - own_weights[i]) * step.numpy()
    return short


def _wanted(
    target: str, own_weights: Floats, weights: csr_array, counts: csr_array, own: Floats, pool: Floats
) -> Floats:
    """Target variances (k, L)."""
    if target == "self":
        return own
    if target == "row":
        return np.asarray(own_weights[:, None] * own + weights @ pool)
    messages = np.maximum(counts.sum(axis=1), 1)
    return np.asarray((counts @ pool) / messages[:, None])


def _scale(own: Array, slot: Slot, wanted: NDArray[np.float64], correction: Correction) -> None:
    """Stretch one tensor of every row of ``own`` to the variances ``wanted`` (k,); 0 leaves a row alone."""
    for rows in _row_blocks(len(own), slot.numel):
        part = own[rows, slot.span]
        mean = part.mean(axis=1, keepdims=True)
        deviation = part - mean
        found = np.square(deviation).mean(axis=1, dtype=np.float64)
        factor = correction.factor(wanted[rows], found)
        deviation *= factor.astype(own.dtype)[:, None]
        deviation += mean
        changed = factor != 1.0
        part[changed] = deviation[changed]


def _row_blocks(rows: int, numel: int) -> list[slice]:
    step = max(1, BLOCK // max(1, numel))
    return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]
