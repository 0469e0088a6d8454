"""What is done to updates before a rule: ``aggregator.before=[nnm]`` under any rule, several in the order given.

Each of them replaces rows by combinations of rows, so a chain of them is one small matrix: inner products of the new
rows follow from those of the old ones, and nothing of the updates' size is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fedsim.rng import torch_rng
from strategies.aggregators.gram import differences, finite_gram, gram, norms, quick_norms, squared_distances
from strategies.aggregators.rows import Report, Rows, RuleError, tolerated, whole

Before = Sequence[
    Any
]  # names, mappings {name: options}, or the functions of this file, partials of them among them
Stage = Callable[[Rows], Rows]


def nnm(updates: Any, *, f: int, report: Report | None = None) -> Any:
    """Nearest neighbour mixing: each row of ``updates`` (n, d) becomes the mean of the n - f rows nearest to it, itself
    among them; n > f.

    Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan: Fixing by Mixing, AISTATS 2023, Alg. 2. Of equally near
    rows the first counts.
    """
    return prepared("nnm", updates, None, [partial(nnm, f=f)], report=report).matrix()


def bucketing(
    updates: Any, *, s: int, permutation: Any = None, seed: int = 0, report: Report | None = None
) -> Any:
    """Means (ceil(n / s), d) of ``s`` rows each of the permuted ``updates`` (n, d); the last may have fewer.

    Karimireddy, He, Jaggi: Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, ICLR 2022, Alg. 1.
    ``permutation`` (n,): the rows in their new order. By default the rows in order of their norms are permuted by a
    draw keyed by ``seed`` and these norms in single precision (of the updates as they came, whatever was done before):
    another one for other updates, whatever their order.
    """
    options = {"s": s, "permutation": permutation, "seed": seed}
    return prepared("bucketing", updates, None, [partial(bucketing, **options)], report=report).matrix()


def clipping(updates: Any, *, c: float = 2.0, report: Report | None = None) -> Any:
    """``u_i min(1, c / |u_i|)`` (n, d): no row is longer than ``c``."""
    return prepared("clipping", updates, None, [partial(clipping, c=c)], report=report).matrix()


def arc(updates: Any, *, f: int, report: Report | None = None) -> Any:
    """Adaptive robust clipping (n, d): the k = floor(2 f (n - f) / n) longest rows are cut to the next longest; n > f.

    Allouah, Guerraoui, Gupta, Jellouli, Rizk, Stephan: Adaptive Gradient Clipping for Robust Federated Learning, ICLR
    2025, Alg. 2.
    """
    return prepared("arc", updates, None, [partial(arc, f=f)], report=report).matrix()


def prepared(
    rule: str,
    updates: Any,
    weights: Any,
    before: Before = (),
    f: Any = None,
    removed: Any = 0,
    report: Report | None = None,
) -> Rows:
    """The rows that ``rule`` works on: the ``updates`` (n, d), after what is done ``before``.

    Args:
        rule: by name, for messages.
        updates: see ``Rows.of``, as are the ``weights``.
        before: see ``stages``.
        f: of the rule; stages that need one and are given none take it.
        removed: updates that were left out before, see ``tolerated``.
        report: receives ``dropped``.
    """
    rows, chain = Rows.of(rule, updates, weights), stages(before, f)
    if not chain:
        return rows
    if any(name == "nnm" for name, _ in chain):
        k, rows = finite_gram(rule, rows, report)
        size = k.diagonal().sqrt()
        rows = _known(rows, products=k, sizes=size, first=size)
    else:
        drawn = any(name == "bucketing" for name, _ in chain)  # by exact norms, the same as after nnm
        size = norms(rows) if drawn else quick_norms(rows)
        good = torch.nonzero(torch.isfinite(size)).flatten().tolist()
        rows = _known(rows.without(rule, good, report), sizes=size[good], first=size[good])
    for name, options in chain:
        if len(rows):
            rows = MAKERS[name](rows, removed, **options)
    return rows


def stages(before: Any, f: Any = None) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of what ``before`` lists.

    An entry is a name (``nnm``), a name with options (``{"bucketing": {"s": 2}}``), or one of the functions of this
    file, bare or in a ``partial``. An ``f`` that is lacking is the rule's.

    Raises:
        RuleError: naming the entry, and what it must be.
    """
    if isinstance(before, str | Mapping) or not isinstance(before, Sequence):
        raise RuleError(
            f"aggregator.before={before!r}: must be a list, e.g. [nnm] or [{{bucketing: {{s: 2}}}}, nnm]"
        )
    return [_stage(entry, f) for entry in before]


def _stage(entry: Any, f: Any) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {}
    name: Any = entry
    while isinstance(name, partial):
        name, options = name.func, name.keywords | options
    if isinstance(name, Mapping) and len(name) == 1:
        ((name, found),) = name.items()
        if found is not None and not isinstance(found, Mapping):
            raise RuleError(
                f"aggregator.before: {name}={found!r}: options are written {{{name}: {{key: value}}}}"
            )
        options = {str(k): v for k, v in (found or {}).items()}
    named = getattr(name, "__name__", name)
    if named not in FUNCTIONS or (callable(name) and name is not FUNCTIONS[named]):
        raise RuleError(f"aggregator.before: {named!r}: choose among {', '.join(FUNCTIONS)}")
    known = [k for k in signature(FUNCTIONS[named]).parameters if k not in ("updates", "report")]
    if unknown := sorted(set(options) - set(known)):
        raise RuleError(f"aggregator.before: {named} has no {unknown[0]!r}; it has {', '.join(known)}")
    if "f" in known and options.setdefault("f", f) is None:
        raise RuleError(
            f"aggregator.before: {named} needs an f, which the rule has not; write {{{named}: {{f: 2}}}}"
        )
    if "s" in known and "s" not in options:
        raise RuleError(f"aggregator.before: {named} needs rows a bucket; write {{{named}: {{s: 2}}}}")
    CHECKS[named](options)
    return named, options


def _known(rows: Rows, **known: Any) -> Rows:
    """The rows as combinations of themselves."""
    return rows.mixed(torch.eye(len(rows), dtype=torch.float64), **known)


def _nnm(rows: Rows, removed: int, *, f: int) -> Rows:
    n, f = len(rows), tolerated("nnm", rows, f, removed)
    nearest = squared_distances(differences(rows, gram(rows))).sort(dim=1, stable=True).indices[:, : n - f]
    return rows.mixed(torch.zeros(n, n, dtype=torch.float64).scatter_(1, nearest, 1 / (n - f)))


def _bucketing(rows: Rows, removed: int, *, s: int, permutation: Any = None, seed: int = 0) -> Rows:
    n = len(rows)
    order = _drawn(rows, seed) if permutation is None else [int(i) for i in permutation]
    if sorted(order) != list(range(n)):
        raise RuleError(f"bucketing: permutation={order}: must hold each of 0 to {n - 1} once")
    buckets = [order[i : i + s] for i in range(0, n, s)]
    by = torch.zeros(len(buckets), n, dtype=torch.float64)
    for i, bucket in enumerate(buckets):
        by[i, bucket] = 1 / len(bucket)
    return rows.mixed(by, [rows.names(bucket) for bucket in buckets])


def _drawn(rows: Rows, seed: int) -> list[int]:
    assert rows.first is not None
    n, (size, order) = len(rows), rows.first.float().sort(stable=True)
    draw = torch.randperm(n, generator=torch_rng(seed, "bucketing", *size.view(torch.int32).tolist()))
    drawn: list[int] = (order[draw] if len(order) == n else draw).tolist()
    return drawn


def _clipping(rows: Rows, removed: int, *, c: float = 2.0) -> Rows:
    return _clipped(rows, norms(rows), c)


def _arc(rows: Rows, removed: int, *, f: int) -> Rows:
    n, f, size = len(rows), tolerated("arc", rows, f, removed), norms(rows)
    return _clipped(rows, size, float(size.sort().values[n - 1 - 2 * f * (n - f) // n]))


def _clipped(rows: Rows, size: Tensor, bound: float) -> Rows:
    factor = torch.where(size > bound, bound / size, 1.0)
    return rows.mixed(torch.diag(factor), sizes=size * factor)


def _size(options: Mapping[str, Any]) -> None:
    c = options.get("c", 2.0)
    if isinstance(c, bool) or not isinstance(c, int | float) or not 0 <= c < float("inf"):
        raise RuleError(f"clipping: c={c!r} must be a number, at least 0: the longest norm")


def _counts(options: Mapping[str, Any]) -> None:
    whole("bucketing", "s", options["s"], 1, "the rows a bucket")
    whole("bucketing", "seed", options.get("seed", 0), 0, "the key of the draw")


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "nnm": nnm,
    "bucketing": bucketing,
    "arc": arc,
    "clipping": clipping,
}
MAKERS: Mapping[str, Callable[..., Rows]] = {
    "nnm": _nnm,
    "bucketing": _bucketing,
    "arc": _arc,
    "clipping": _clipping,
}
CHECKS: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "nnm": lambda o: whole("nnm", "f", o["f"], 0, "the wrong updates to tolerate"),
    "arc": lambda o: whole("arc", "f", o["f"], 0, "the wrong updates to tolerate"),
    "bucketing": _counts,
    "clipping": _size,
}
