"""Weights of a run as files: those of the last round, and those of the round that was best on validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.errors import CheckpointError
from fedsim.task.frozen import left_out
from fedsim.task.standalone import state_of
from fedsim.task.task import Task
from fedsim.task.vectors import Weights

LAST, BEST = "weights.safetensors", "weights_best.safetensors"
Row = Mapping[str, Any]


def save(
    path: Path, task: Task, dtype: torch.dtype, weights: Weights, about: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Write ``weights`` as a state dict, which is returned; the file appears by one rename.

    Of a model that is frozen for the most part, both hold the rest, and the file's head says of what base it is.
    """
    names, base = left_out(task.model)
    state = state_of(task.model, dtype, weights, without=names)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(
            {k: v.contiguous() for k, v in state.items()},
            temporary,
            metadata={**(base or {}), **(about or {})},
        )
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} could not be written ({e}); make room and type the same command again"
        ) from e
    return state


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in the file ``path`` of a finished run.

    Raises:
        CheckpointError: if it is missing or damaged, and what to do.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as e:
        why = "is missing" if not path.exists() else f"is damaged ({e})"
        remedy = (
            "delete it and type the run's command again: it is made from the checkpoint"
            if path.name == LAST
            else "type the run's command again with resume=never"
        )
        raise CheckpointError(f"{path} {why}; {remedy}") from e


def is_best(rows: Sequence[Row]) -> bool:
    """Whether the last of ``rows`` was validated and is better than all before: by ``val/accuracy`` where it has one,
    else by ``val/loss``; of equal ones the earliest is the best."""
    last = rows[-1]
    name, sign = ("val/accuracy", 1) if "val/accuracy" in last else ("val/loss", -1)
    if (value := last.get(name)) is None or value != value:
        return False
    return all(not (sign * row[name] >= sign * value) for row in rows[:-1] if row.get(name) is not None)
