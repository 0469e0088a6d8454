"""Folding: how the updates of a chunk become sums in client order, and the chunks' sums one total in chunk order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedsim.errors import ClientError

KINDS = ("mean", "sum", "stack", "cat")
SINGLE = ("stack", "cat")  # kinds that keep every contribution

Fold = Mapping[str, str | Sequence[str]]


def fold_kinds(fold: Fold) -> dict[str, tuple[str, ...]]:
    """Normalise a fold: array name to kinds among mean, sum, stack, cat (end to end; lengths may differ)."""
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
        self.rows: dict[tuple[str, str], list[Tensor]] = {
            (n, kind): [] for n, kinds in fold.items() for kind in kinds if kind in SINGLE
        }
        self.blocks: dict[tuple[str, str], Tensor] = {}

    def check(self, arrays: Mapping[str, Tensor]) -> None:
        """Refuse an update whose names or shapes do not match the fold, before anything is added."""
        if arrays.keys() != self._fold.keys():
            raise ClientError(
                f"the update holds {sorted(arrays)}, but the strategy folds {sorted(self._fold)}; "
                "send exactly the arrays that the strategy's fold names"
            )
        for name, array in arrays.items():
            if name in self._seen and (kind := self._kind(name, array)) != self._seen[name]:
                raise ClientError(_unlike(name, kind, self._seen[name]))

    def frames(self, frames: Mapping[str, Tensor]) -> None:
        """What of the update travels in another form than it is folded in: of use to who sends it on."""

    def add(self, arrays: Mapping[str, Tensor], weight: float) -> None:
        """Fold one update; ``arrays`` may be views of a buffer that is reused afterwards."""
        for name, kinds in self._fold.items():
            array = arrays[name]
            if name not in self._seen:
                self._seen[name] = self._kind(name, array)
            for kind in kinds:
                if kind in SINGLE:
                    self.rows[name, kind].append(array.clone())
                elif (name, kind) not in self.sums:
                    first = array.to(_sum_dtype(array.dtype, kind))
                    if len(kinds) > 1 or not self.owns(first):
                        self.sums[name, kind] = first * weight if kind == "mean" else first.clone()
                    else:
                        self.sums[name, kind] = first.mul_(weight) if kind == "mean" else first
                else:
                    self.sums[name, kind].add_(array, alpha=weight if kind == "mean" else 1)

    def _kind(self, name: str, array: Tensor) -> tuple[torch.Size, torch.dtype]:
        """What must agree between clients: all of the shape, or all but its length."""
        return (array.shape[1:] if self._fold[name] == ("cat",) else array.shape), array.dtype

    def owns(self, array: Tensor) -> bool:
        """Whether an array that was folded is nobody else's, so that sums may be written in its place."""
        return False

    def cpu(self) -> Folder:
        """The same sums in main memory, and rows as one block each."""
        self.sums = {k: v.cpu() for k, v in self.sums.items()}
        self.blocks = {k: v.cpu() for k, v in self.stacked().items()}
        self.rows = {}
        return self

    def stacked(self) -> dict[tuple[str, str], Tensor]:
        """All rows as blocks: ``(n, *shape)``, or laid end to end."""
        return self.blocks or {
            k: torch.stack(v) if k[1] == "stack" else torch.cat(v) for k, v in self.rows.items() if v
        }


def combine(parts: Iterable[Folder], count: int = 0) -> dict[tuple[str, str], Tensor]:
    """Add the sums of chunks, in the order given, each as it comes; single contributions are stacked or laid end to
    end, those stacked best with a hint of their ``count``."""
    totals: dict[tuple[str, str], Tensor] = {}
    rows: dict[tuple[str, str], Tensor] = {}
    filled: dict[tuple[str, str], int] = {}
    fresh: set[tuple[str, str]] = set()

    def take(part: Folder) -> None:
        for k, v in part.sums.items():
            if k not in totals:
                totals[k] = v
                fresh.update({k} if part.owns(v) else ())
            elif totals[k].shape != v.shape:  # adding them would broadcast
                raise ClientError(_unlike(k[0], (v.shape, v.dtype), (totals[k].shape, totals[k].dtype)))
            elif k in fresh:
                totals[k].add_(v)
            else:
                totals[k] = totals[k] + v
                fresh.add(k)
        for k, block in part.stacked().items():
            if k not in rows:
                hint = count if k[1] == "stack" else 0
                rows[k], filled[k] = block.new_empty((hint, *block.shape[1:])), 0
            whole, at = rows[k], filled[k]
            if (block.shape[1:], block.dtype) != (whole.shape[1:], whole.dtype):
                raise ClientError(
                    _unlike(k[0], (block.shape[1:], block.dtype), (whole.shape[1:], whole.dtype))
                )
            if at + len(block) > len(whole):
                rows[k] = torch.cat([whole[:at], block])
            else:
                whole[at : at + len(block)] = block
            filled[k] += len(block)

    for part in parts:
        take(part)
        del part  # or it would lie in memory while the next one is computed
    totals.update({k: whole[: filled[k]] for k, whole in rows.items()})
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
