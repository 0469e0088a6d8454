"""What a model was seen to do before its first message, kept at the node: the trial need not be made for each message.

Flower gives each message a process of its own. The trial steps of ``fedsim.task.rehearsal`` take longer there than a
short local training, and two more models' memory. What they found holds as long as settings, data and code are the
same: within one run of Flower's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fedsim.data.local import Batch
from fedsim.task.habits import Habits
from fedsim.task.rehearsal import rehearsed
from fedsim.task.task import Task


class HabitsFile:
    """The file of one client at its node, for what ``about`` names; others' contents are replaced."""

    def __init__(self, folder: Path, client: int, about: Sequence[Any]):
        self.path = folder / "nodes" / f"client-{client}-habits.json"
        self._about = hashlib.sha256(json.dumps([*about]).encode()).hexdigest()

    def found(self, task: Task, batch: Batch, dtype: torch.dtype) -> Habits:
        """As :func:`rehearsed` finds them, or found them before."""
        if (kept := self._read()) is not None:
            return kept
        habits = rehearsed(task, batch, dtype)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        scratch.write_text(json.dumps({"about": self._about, **asdict(habits)}))
        scratch.replace(self.path)
        return habits

    def _read(self) -> Habits | None:
        try:
            kept = dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        names = {f.name for f in fields(Habits)}
        if kept.pop("about", None) != self._about or kept.keys() != names:
            return None
        found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else bool(v) for k, v in kept.items()}
        return Habits(**found)
