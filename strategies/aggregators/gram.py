"""The n x n matrix of inner products of the updates: all that distance rules and the flag aggregator look at."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.aggregators.rows import WIDE, Report, Rows

LOST = 1e-30  # a mean square in float32 below which its parts may have vanished
STRIP = 16  # rows multiplied at once with those from the same row on: the lower half is never computed


def gram(rows: Rows, around: Tensor | None = None) -> Tensor:
    """``K_ij = <u_i, u_j>`` (n, n), float64, one pass; symmetric to the bit. Of ``u_i - around`` if that (d,) is given.

    Products are taken and added up in float64, since distances are differences of entries. Those of combinations of
    rows follow from those of the rows.
    """
    if rows.products is not None and around is None:
        return rows.products
    if rows.mix is not None and around is None:
        k = rows.mix @ gram(rows.unmixed) @ rows.mix.T
        return (k + k.T) / 2
    n = len(rows)
    total = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
    for start, stop in rows.spans():
        x = rows.read(start, stop) if around is None else rows.read(start, stop).sub_(around[start:stop])
        for i in range(0, n, STRIP):
            total[i : i + STRIP, i:].addmm_(x[i : i + STRIP], x[i:].T)
    upper = total.triu().cpu()
    return upper + upper.triu(1).T


def finite_gram(rule: str, rows: Rows, report: Report | None) -> tuple[Tensor, Rows]:
    """The Gram matrix of the finite rows, and those rows.

    A NaN or infinity spoils its own row and column only, so the diagonal tells which rows to drop and no further pass
    is needed. A float64 row whose squared norm overflows counts as not finite.
    """
    k = gram(rows)
    good = torch.nonzero(torch.isfinite(k.diagonal())).flatten().tolist()
    return k[good][:, good], rows.without(rule, good, report)


def norms(rows: Rows, around: Tensor | None = None) -> Tensor:
    """``|u_i|`` (n,), float64, one pass; not finite for a row that is not.

    Of ``u_i - around`` if that (d,) is given.
    """
    if rows.sizes is not None and around is None:
        return rows.sizes
    if rows.mix is not None and around is None:
        return gram(rows).diagonal().clamp(min=0).sqrt()
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start, stop in rows.spans():
        x = rows.read(start, stop) if around is None else rows.read(start, stop).sub_(around[start:stop])
        total += torch.linalg.vecdot(x, x)
    return total.cpu().sqrt()


def quick_norms(rows: Rows) -> Tensor:
    """``|u_i|`` (n,) to 1e-7 of each, one pass; of float32 rows a third of what ``norms`` costs.

    Squares are added up in float32 within a piece, and exactly where some would be lost or infinite.
    """
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start, stop in rows.spans(WIDE):
        if rows.sizes is not None or (x := rows.single(start, stop)) is None:
            return norms(rows)
        total += torch.linalg.vector_norm(x, dim=1).to(torch.float64).square()
    small = total < rows.dim * LOST
    return norms(rows) if bool((small | ~torch.isfinite(total)).any()) else total.cpu().sqrt()


def squared_from(rows: Rows, own: int) -> Tensor:
    """``|u_i - u_own|^2`` (n,), float64, of rows as they were given; one pass, NaN throughout where ``own`` is not
    finite."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start, stop in rows.spans():
        x = rows.read(start, stop)
        x -= x[own].clone()
        total += torch.linalg.vecdot(x, x)
    return total.cpu()


def squared_distances(k: Tensor) -> Tensor:
    """``|u_i - u_j|^2 = K_ii + K_jj - 2 K_ij`` (n, n), not negative, zero on the diagonal."""
    size = k.diagonal()
    out = (size[:, None] + size[None, :] - 2 * k).clamp_(min=0)
    return out.fill_diagonal_(0)


def median(values: Tensor) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = values.sort().values
    n = len(ordered)
    return float(ordered[(n - 1) // 2] + ordered[n // 2]) / 2
