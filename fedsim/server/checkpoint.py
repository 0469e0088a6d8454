"""Checkpoints: the strategy's state as safetensors and JSON, put in place atomically, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.errors import CheckpointError
from fedsim.server import segments
from fedsim.server.clientstore import ClientStore
from fedsim.server.older import with_padding
from fedsim.task.layout import Layout

FORMAT = 2  # 1: vectors without padding
Upgrade = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``rounds`` finished rounds."""

    rounds: int
    state: dict[str, Any]
    clients: Mapping[str, Any]  # index for ClientStore.restore
    upgrade: Upgrade | None = (
        None  # what tensors of an older format, such as clients' states, have to go through
    )


def save(
    folder: Path, rounds: int, state: Mapping[str, Any], clients: ClientStore, key: str, keep: str = "last"
) -> Path:
    """Write the checkpoint of ``rounds`` finished rounds and remove older ones that are not to be kept.

    ``state`` holds tensors and JSON-plain values. The new folder appears by one rename: a kill leaves either the
    old checkpoint or the new one. ``key`` identifies the run's configuration. ``keep``: see :func:`keeps`; with a
    checkpoint the segments of client states that it names are kept.
    """
    target, temporary = folder / f"round-{rounds:06d}", folder / f".round-{rounds:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = _apart({k: v for k, v in state.items() if isinstance(v, Tensor)})
    plain = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    save_file(tensors, temporary / "state.safetensors")
    values = {name: json.loads(as_json(name, value)) for name, value in plain.items()}
    meta: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "rounds": rounds,
        "values": values,
        "tensors": sorted(tensors),
        "sha256": _sha256(temporary / "state.safetensors"),
        "clients": clients.flush(),
    }
    (temporary / "checkpoint.json").write_text(json.dumps(meta))
    for name in ("state.safetensors", "checkpoint.json"):
        with (temporary / name).open("rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    kept = {p.name for p in there(folder) if p != target and keeps(keep, rounds_of(p))}
    for old in (*there(folder), *folder.glob(".round-*.tmp")):
        if old != target and old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)
    held = {name: clients.held.get(name) or segments_of(folder / name) for name in sorted(kept)}
    clients.held = held | {target.name: frozenset(meta["clients"]["sha256"])}
    clients.prune()
    return target


def as_json(name: str, value: Any) -> str:
    """An entry of the state that is no tensor.

    Raises:
        CheckpointError: naming the entry, if it is no plain value.
    """
    _check_keys(value, name)
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as e:
        raise CheckpointError(
            f"strategy state {name!r} holds what a checkpoint cannot: {e}; use tensors (torch.stack for several of one "
            "shape, else one entry each) and plain values"
        ) from e


def keeps(keep: str, rounds: int) -> bool:
    """Whether the checkpoint of ``rounds`` finished rounds outlives newer ones: by ``last`` none does, by ``all``
    every one, by ``every:N`` those of rounds N, 2N, ..."""
    return keep == "all" or (keep.startswith("every:") and rounds % int(keep.removeprefix("every:")) == 0)


def there(folder: Path) -> list[Path]:
    """All checkpoints in ``folder``, the oldest first."""
    return sorted(folder.glob("round-*"), key=rounds_of)


def rounds_of(path: Path) -> int:
    """Rounds that were finished when a checkpoint was made, by its name; -1 for what is none."""
    number = path.name.removeprefix("round-")
    return int(number) if number.isdigit() else -1


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, or ``None``."""
    found = there(folder)
    return found[-1] if found else None


def before(folder: Path, round: int) -> Path | None:
    """The newest checkpoint in ``folder`` from which ``round`` (from 1) is yet to be computed, or ``None``."""
    found = [path for path in there(folder) if 0 <= rounds_of(path) < round]
    return found[-1] if found else None


def load(path: Path, key: str, layout: Layout | None = None) -> Checkpoint:
    """Read and verify a checkpoint; damaged or foreign ones are refused by name.

    Vectors of an older format are brought to today's ``layout``, if it is given.
    """
    afresh = "delete it or give resume=never to start afresh"
    try:
        meta = json.loads((path / "checkpoint.json").read_text())
        digest = _sha256(path / "state.safetensors")
        if lacking := sorted({"format", "key", "rounds", "values", "sha256", "clients"} - set(meta)):
            raise ValueError(f"checkpoint.json lacks {lacking[0]}")
    except (OSError, ValueError, TypeError) as e:  # no JSON, no text
        raise CheckpointError(f"checkpoint {path} is damaged ({e}); {afresh}") from e
    if meta.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"checkpoint {path} has format {meta.get('format')}, expected {FORMAT} or 1; {afresh}"
        )
    if meta["key"] != key:
        raise CheckpointError(
            f"checkpoint {path} belongs to another configuration (key {meta['key'][:8]}, this run is {key[:8]}); "
            "give another dir, or resume=never to start afresh"
        )
    if digest != meta["sha256"]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: state.safetensors does not match its checksum; {afresh}"
        )
    tensors = load_file(path / "state.safetensors")
    upgrade = partial(with_padding, layout=layout) if meta["format"] == 1 and layout is not None else None
    state = {**meta["values"], **(upgrade(tensors) if upgrade else tensors)}
    return Checkpoint(meta["rounds"], state, meta["clients"], upgrade)


def key_of(path: Path) -> str | None:
    """The key of the run that a checkpoint belongs to; ``None`` if it cannot be read."""
    try:
        return str(json.loads((path / "checkpoint.json").read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def change_key(path: Path, key: str) -> None:
    """Let a checkpoint belong to ``key``, in one step."""
    meta = json.loads((path / "checkpoint.json").read_text())
    temporary = path / "checkpoint.json.tmp"
    temporary.write_text(json.dumps(meta | {"key": key}))
    temporary.replace(path / "checkpoint.json")


def segments_of(path: Path) -> frozenset[str]:
    """Names of the files of client states that a checkpoint needs; none if it cannot be read.

    Raises:
        CheckpointError: if one is not beside it, but a path to elsewhere.
    """
    try:
        names = frozenset(json.loads((path / "checkpoint.json").read_text())["clients"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
    for name in names:
        segments.check_name(name)
    return names


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the file format wants them."""
    seen: set[int] = set()
    out = {}
    for name, t in tensors.items():
        t = t.contiguous()
        place = t.untyped_storage().data_ptr()
        out[name] = t.clone() if place in seen else t
        seen.add(place)
    return out


def _check_keys(value: Any, where: str) -> None:
    """JSON would turn keys that are no strings into strings, silently: after a resume they were others."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"strategy state '{where}' has the key {key!r}; keys must be strings")
            _check_keys(inner, where)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner, where)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
