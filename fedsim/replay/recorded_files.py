"""The files of a run beside its rows: are weights, checkpoint and summary what the rows, computed again, stand for?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedsim.errors import CheckpointError
from fedsim.report.objective import SHARES
from fedsim.server import checkpoint, segments
from fedsim.server.weightsfile import BEST, LAST
from fedsim.tracking.rows import read_rows

SUMMARY, ROWS = "summary.json", "metrics.jsonl"
MEASURED = ("loss", *SHARES)  # endings of columns that hang on weights and samples alone
OF_ROWS = ("loss", "accuracy", "clients/loss", "clients/accuracy", "val/loss", "val/accuracy", "weights_hash")
OF_BOTH = ("partition_hash", "initial_hash")  # that no row holds


def differing_files(run: Path, again: Path, *, whole: bool = True) -> dict[str, str]:
    """What is wrong, by the file's name, with files of ``run``; ``again`` is the folder where it was computed again,
    with the same rows.

    ``whole``: both went on to the same round, and their weights and state can be compared.
    """
    found = dict(_summary(run, again))
    if whole and (why := _measured(run, again)):
        found[ROWS] = why
    finished = (
        SUMMARY not in found
        and _read(run / SUMMARY).get("status") == "done"
        and "weights_hash" in _read(run / SUMMARY)
    )
    for name in (LAST, BEST):
        if why := _tensors(run / name, again / name, compare=whole, needed=finished):
            found[name] = why
    return found | dict(_checkpoints(run, again, compare=whole))


def _read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(document, dict):
        raise ValueError(f"holds {type(document).__name__}, no object")
    return document


def _summary(run: Path, again: Path) -> Iterator[tuple[str, str]]:
    try:
        summary, other = _read(run / SUMMARY), _read(again / SUMMARY)
    except (OSError, ValueError) as error:
        yield SUMMARY, f"is damaged ({error})"
        return
    if "weights_hash" not in summary:  # of a run that did not finish, or of another version
        return
    rows = [row for row in read_rows(run / ROWS) if isinstance(row.get("round"), int)]
    rows.sort(key=lambda row: row["round"])
    if summary.get("rounds") != rows[-1]["round"]:
        yield SUMMARY, f"says rounds={summary.get('rounds')}, the last row {rows[-1]['round']}"
        return
    for name in OF_ROWS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and name in summary and not _same(summary[name], values[-1]):
            yield SUMMARY, f"says {name}={_shown(summary[name])}, the rows {_shown(values[-1])}"
            return
    for name in OF_BOTH:
        if name in summary and name in other and summary[name] != other[name]:
            yield SUMMARY, f"says {name}={_shown(summary[name])}, computed {_shown(other[name])}"
            return


def _measured(run: Path, again: Path) -> str:
    """The first measured number that is another one than what was computed; empty if none is."""
    computed = {row["round"]: row for row in read_rows(again / ROWS)}
    for row in read_rows(run / ROWS):
        other = computed.get(row.get("round"), {})
        for name, value in row.items():
            if (
                name.endswith(MEASURED)
                and None not in (value, other.get(name))
                and not _near(value, other[name])
            ):
                return (
                    f"says {name}={_shown(value)} after round {row['round']}, computed {_shown(other[name])}"
                )
    return ""


def _near(one: Any, other: Any) -> bool:
    """Whether they are the same but for the order of a sum."""
    numbers = all(isinstance(v, int | float) for v in (one, other))
    return _same(one, other) or (numbers and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9))


def _same(one: Any, other: Any) -> bool:
    a, b = (float("nan") if v == "NaN" else v for v in (one, other))
    return bool(a == b or (a != a and b != b))


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _tensors(path: Path, again: Path, *, compare: bool, needed: bool) -> str:
    """What is wrong with the tensors in a file; empty if nothing is."""
    if not path.exists():
        return "is missing" if needed and again.exists() else ""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        return f"is damaged ({error})"
    return _difference(found, load_file(again)) if compare and again.exists() else ""


def _difference(found: Mapping[str, Tensor], computed: Mapping[str, Tensor]) -> str:
    if names := sorted(set(found) ^ set(computed)):
        return f"{'lacks' if names[0] in computed else 'holds also'} {names[0]!r}"
    for name, t in computed.items():
        if found[name].dtype != t.dtype or found[name].shape != t.shape or _bytes(found[name]) != _bytes(t):
            return f"holds other numbers in {name!r} than those computed"
    return ""


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _checkpoints(run: Path, again: Path, *, compare: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with the checkpoints, and with the client states that they name."""
    for path in checkpoint.there(run / "checkpoint"):
        name = f"checkpoint/{path.name}"
        try:
            loaded = checkpoint.load(path, checkpoint.key_of(path) or "")
            for file, checksum in loaded.clients["sha256"].items():
                segments.opened(path.parent / file, checksum, {})
        except (CheckpointError, SafetensorError, KeyError, TypeError, AttributeError) as error:
            said = str(error).removeprefix(f"checkpoint {path} ")
            yield name, said if said != str(error) else f"is damaged ({error})"
            continue
        if loaded.rounds != checkpoint.rounds_of(path):
            yield name, f"says rounds={loaded.rounds}"
            continue
        other = again / "checkpoint" / path.name
        if compare and other.is_dir() and loaded.upgrade is None:
            state = checkpoint.load(other, checkpoint.key_of(other) or "").state
            here, there = (
                {k: v for k, v in s.items() if isinstance(v, Tensor)} for s in (loaded.state, state)
            )
            if why := _difference(here, there):
                yield name, why
