"""What travels: one type for messages and updates, checked and normalised the same way in every engine.

A payload holds named arrays and named scalars. What passes here passes through Flower's records too, so a method that
works in simulation works when deployed.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ClientError

Scalar = bool | int | float | str | bytes
Value = Scalar | list[int] | list[float] | list[str]

KINDS = ("mean", "sum", "stack")


@dataclass(frozen=True)
class Payload:
    """Named arrays (any shape; floats, integers, bool) and named plain values. Read-only for its receiver."""

    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)

    @staticmethod
    def of(arrays: Mapping[str, Any] | None = None, values: Mapping[str, Any] | None = None) -> Payload:
        """Check and normalise: numpy arrays become tensors, numpy scalars Python ones, the rest is refused by name."""
        return Payload(
            {_name(k): _array(k, v) for k, v in (arrays or {}).items()},
            {_name(k): _value(k, v) for k, v in (values or {}).items() if v is not None},
        )

    def to(self, device: str) -> Payload:
        """The same payload with its arrays on ``device``."""
        return Payload({k: v.to(device) for k, v in self.arrays.items()}, self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the content: array data, 8 per number, the encoded length of text."""
        return sum(t.numel() * t.element_size() for t in self.arrays.values()) + sum(
            map(_value_bytes, self.values.values())
        )


@dataclass(frozen=True)
class Message:
    """Server to clients: one ``shared`` payload for the cohort and an optional part per client."""

    shared: Payload = field(default_factory=Payload)
    each: Mapping[int, Payload] = field(default_factory=dict)

    @staticmethod
    def of(
        arrays: Mapping[str, Any] | None = None,
        values: Mapping[str, Any] | None = None,
        each: Mapping[int, Payload] | None = None,
    ) -> Message:
        """A message from plain dicts of arrays and values."""
        return Message(Payload.of(arrays, values), dict(each or {}))


@dataclass(frozen=True)
class Update:
    """Client to server: what one client contributes.

    ``weight`` enters every "mean" fold (sample count, or 1). ``state`` is the client's new state, committed only if the
    server accepts the update; ``None`` leaves the old one. ``metrics`` go to the log, not to the strategy.
    """

    arrays: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    values: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def payload(self) -> Payload:
        """The part that travels."""
        return Payload.of(self.arrays, {**self.values, "weight": float(self.weight)})


class Refusal(Exception):  # noqa: N818 - an answer, not an error
    """Raised by a client's own code: it has nothing to contribute this time."""


@dataclass
class Outcome:
    """What became of one client in one exchange; a row of the log."""

    client: int
    kind: str  # ok | refused | failed | nonfinite | dropped
    weight: float = 0.0
    values: Mapping[str, Value] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    samples: int = 0  # processed, local epochs included
    seconds: float = 0.0
    reason: str = ""
    task: str = "fit"


@dataclass
class Replies:
    """All answers to one exchange, in client order.

    ``total(name)`` is the sum over clients of an array, ``mean(name)`` its weighted mean, ``stack(name)`` the
    ``(n, *shape)`` array of single contributions, for whichever kinds the strategy's fold asked for.
    """

    outcomes: Sequence[Outcome]
    folded: Mapping[tuple[str, str], Tensor]

    @property
    def ok(self) -> list[Outcome]:
        """Those who contributed."""
        return [o for o in self.outcomes if o.kind == "ok"]

    @property
    def clients(self) -> list[int]:
        """Ids of those who contributed, ascending."""
        return [o.client for o in self.ok]

    @property
    def weights(self) -> Tensor:
        """Aggregation weights ``(n,)``, float64, in the order of ``clients``."""
        return torch.tensor([o.weight for o in self.ok], dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.ok)

    def values(self, name: str) -> list[Value]:
        """One value per contributing client."""
        return [o.values[name] for o in self.ok]

    def total(self, name: str) -> Tensor:
        """Unweighted sum over clients."""
        return self._get(name, "sum")

    def stack(self, name: str) -> Tensor:
        """Single contributions ``(n, *shape)`` in the order of ``clients``."""
        return self._get(name, "stack")

    def mean(self, name: str) -> Tensor:
        """Weighted mean over clients (a fresh tensor); from the plain sum if asked for that and weights are equal."""
        weights = [o.weight for o in self.ok]
        if not sum(weights) > 0:
            raise ClientError(f"the mean of '{name}' needs a positive total weight, got {sum(weights)}")
        if (name, "mean") not in self.folded and (name, "sum") in self.folded and len(set(weights)) == 1:
            return self.total(name) / len(weights)
        return self._get(name, "mean") / sum(weights)

    def _get(self, name: str, kind: str) -> Tensor:
        try:
            return self.folded[name, kind]
        except KeyError:
            have = ", ".join(f"{n}: {k}" for n, k in self.folded) or "nothing"
            raise ClientError(
                f"replies hold no '{kind}' of '{name}' (folded: {have}); "
                f"ask for it in the strategy's fold: {{'{name}': '{kind}'}}, and send it in the client's update"
            ) from None


Fold = Mapping[str, str | Sequence[str]]


def fold_kinds(fold: Fold) -> dict[str, tuple[str, ...]]:
    """Normalise a fold: array name to kinds among mean, sum, stack."""
    out = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in fold.items()}
    for name, kinds in out.items():
        for kind in kinds:
            if kind not in KINDS:
                raise ClientError(
                    f"fold of '{name}': '{kind}' is no kind of fold; choose from {', '.join(KINDS)}"
                )
    return out


class Folder:
    """Running sums of one chunk, in client order."""

    def __init__(self, fold: Mapping[str, tuple[str, ...]]):
        self._fold = fold
        self._seen: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {n: [] for n, kinds in fold.items() if "stack" in kinds}

    def check(self, arrays: Mapping[str, Tensor]) -> None:
        """Refuse an update whose names or shapes do not match the fold, before anything is added."""
        if set(arrays) != set(self._fold):
            raise ClientError(
                f"the update holds {sorted(arrays)}, but the strategy folds {sorted(self._fold)}; "
                "send exactly the arrays that the strategy's fold names"
            )
        for name, array in arrays.items():
            kind = array.shape, array.dtype
            if kind != (seen := self._seen.get(name, kind)):
                raise ClientError(_unlike(name, kind, seen))

    def add(self, arrays: Mapping[str, Tensor], weight: float) -> None:
        """Fold one update; ``arrays`` may be views of a buffer that is reused afterwards."""
        for name, kinds in self._fold.items():
            array = arrays[name]
            self._seen[name] = array.shape, array.dtype
            for kind in kinds:
                if kind == "stack":
                    self.rows[name].append(array.clone())
                elif (name, kind) not in self.sums:
                    first = array.to(_sum_dtype(array.dtype, kind), copy=True)
                    self.sums[name, kind] = first.mul_(weight) if kind == "mean" else first
                else:
                    self.sums[name, kind].add_(array, alpha=weight if kind == "mean" else 1)

    def cpu(self) -> Folder:
        """The same sums in main memory."""
        self.sums = {k: v.cpu() for k, v in self.sums.items()}
        self.rows = {k: [t.cpu() for t in v] for k, v in self.rows.items()}
        return self


def combine(parts: Iterable[Folder]) -> dict[tuple[str, str], Tensor]:
    """Add the sums of chunks, in the order given; rows are stacked."""
    totals: dict[tuple[str, str], Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    fresh: set[tuple[str, str]] = set()
    for part in parts:
        for k, v in part.sums.items():
            if k not in totals:
                totals[k] = v
            elif totals[k].shape != v.shape:  # adding them would broadcast
                raise ClientError(_unlike(k[0], (v.shape, v.dtype), (totals[k].shape, totals[k].dtype)))
            elif k in fresh:
                totals[k].add_(v)
            else:
                totals[k] = totals[k] + v
                fresh.add(k)
        for name, more in part.rows.items():
            rows.setdefault(name, []).extend(more)
    totals.update({(n, "stack"): torch.stack(r) for n, r in rows.items() if r})
    return totals


def _sum_dtype(dtype: torch.dtype, kind: str) -> torch.dtype:
    """Sums of halves are kept in float32, of integers and bools in int64 (means: float64): nothing overflows."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.float32 if dtype == torch.float16 else dtype
    return torch.int64 if kind == "sum" else torch.float64


def _unlike(name: str, here: tuple[torch.Size, torch.dtype], others: tuple[torch.Size, torch.dtype]) -> str:
    return (
        f"'{name}' has shape {tuple(here[0])}, {here[1]}; other clients sent {tuple(others[0])}, {others[1]}"
    )


def _name(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise ClientError(f"payload names are non-empty strings, got {name!r}")
    return name


def _array(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise ClientError(f"array '{name}': object arrays cannot travel; send a numeric array")
        try:
            value = torch.from_numpy(np.require(value, requirements="C"))  # keeps 0-d arrays 0-d
        except TypeError as e:
            raise ClientError(
                f"array '{name}': {value.dtype} cannot travel; send a numeric array ({e})"
            ) from None
    if not isinstance(value, Tensor):
        raise ClientError(f"array '{name}': expected a tensor or numpy array, got {type(value).__name__}")
    if value.dtype == torch.bfloat16:
        raise ClientError(f"array '{name}': bfloat16 cannot travel; send .float() or .half()")
    return value.detach()


def _value(name: str, value: Any) -> Value:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        value = value.item()
    if isinstance(value, bool | int | float | bytes):
        return value
    if isinstance(value, str):
        if not value:
            raise ClientError(f"value '{name}': an empty string cannot travel; leave the key out")
        return value
    if isinstance(value, list | tuple):
        items = [v.item() if isinstance(v, np.generic) else v for v in value]
        kinds = {type(v) for v in items}
        if len(kinds) <= 1 and kinds <= {int, float, str}:
            return items
    if isinstance(value, numbers.Real):
        return float(value)
    raise ClientError(
        f"value '{name}': {type(value).__name__} cannot travel; "
        "send bool, int, float, str, bytes or a list of one of int, float, str (arrays belong in `arrays`)"
    )


def _value_bytes(value: Value) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list):
        return sum(map(_value_bytes, value))
    return 8
