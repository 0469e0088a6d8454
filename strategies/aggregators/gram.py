"""The n x n matrix of inner products of the updates: all that distance rules and the flag aggregator look at."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.aggregators.rows import WIDE, Report, Rows

CLOSE = 1e-6  # of the squared lengths: squared distances below it lose 10 of 16 digits
LOST = 1e-30  # a mean square in float32 below which its parts may have vanished
SHORT = 256  # float32 squares added up in float32
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


def near_gram(rule: str, rows: Rows, report: Report | None) -> tuple[Tensor, Rows]:
    """As ``finite_gram``, for rules that look at differences of rows only.

    Where a row has half of the others so close, for their lengths, that inner products would leave little of the
    differences, it is taken from all rows first: one pass more.
    """
    k, rows = finite_gram(rule, rows, report)
    return differences(rows, k), rows


def differences(rows: Rows, k: Tensor) -> Tensor:
    """The Gram matrix ``k`` (n, n) of the rows, or that of the rows less one of them, see ``near_gram``."""
    n, size = len(k), k.diagonal()
    if n < 2:
        return k
    share = squared_distances(k) / (size[:, None] + size[None, :])
    share = share.nan_to_num(nan=0.0).fill_diagonal_(float("inf"))
    half = share.sort(dim=1).values[:, n // 2 - 1]
    middle = int(half.argmin())
    if not float(half[middle]) < CLOSE or not float(size[middle]) > 0:
        return k
    one = rows.combine(torch.eye(n, dtype=torch.float64)[middle])
    return gram(rows, torch.as_tensor(one).to(rows.device, torch.float64))


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
    """``|u_i|`` (n,) to 2e-7 of each, one pass; of float32 rows a third of what ``norms`` costs.

    Squares are added up in float32 within stretches of ``SHORT``, and in float64 where some would be lost or infinite.
    """
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start, stop in rows.spans(WIDE):
        if rows.sizes is not None or (x := rows.single(start, stop)) is None:
            return norms(rows)
        even = (stop - start) // SHORT * SHORT
        parts = torch.linalg.vector_norm(x[:, :even].view(len(rows), even // SHORT, SHORT), dim=2)
        rest = torch.linalg.vector_norm(x[:, even:], dim=1, keepdim=True)
        total += torch.cat([parts, rest], dim=1).to(torch.float64).square().sum(1)
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
