"""Run folders as data frames: what a notebook starts from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import ConfigError
from fedsim.report.runs import Run, load_runs
from fedsim.tracking.rows import read_rows, scalars

if TYPE_CHECKING:
    import pandas as pd


class LoadedRuns:
    """``runs``, ``rows`` and ``clients`` of run folders; ``run``, the folder, is in each of them."""

    def __init__(self, found: Sequence[Run]) -> None:
        self.found = tuple(found)

    def __repr__(self) -> str:
        return f"{len(self.found)} runs of {', '.join(dict.fromkeys(run.method for run in self.found))}"

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row per run: folder, method, seed, status, all settings under dotted names, the summary's other values."""
        lines = []
        for run in self.found:
            own = self._own(run) | {"status": run.status}
            facts = {k: v for k, v in run.facts.items() if not isinstance(v, dict | list)}
            lines.append(own | dict(run.settings) | {k: v for k, v in facts.items() if k not in own})
        return self._frame(lines)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """A row per run and round: the numbers of ``metrics.jsonl``; ``NaN`` where nothing was measured."""
        return self._frame(self._own(run) | scalars(row) for run in self.found for row in run.rows)

    @cached_property
    def clients(self) -> pd.DataFrame:
        """A row per run, round, client and metric: ``clients.jsonl``, which can be large."""
        paths = [(run, run.dir / "clients.jsonl") for run in self.found]
        return self._frame(
            self._own(run) | row for run, path in paths if path.is_file() for row in read_rows(path)
        )

    @staticmethod
    def _own(run: Run) -> dict[str, Any]:
        return {"run": str(run.dir), "method": run.method, "seed": run.seed}

    @staticmethod
    def _frame(lines: Any) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(list(lines))


def load(*dirs: str | Path | Sequence[str | Path]) -> LoadedRuns:
    """The runs in folders, at any depth, as data frames: ``fedsim.load("runs/cmp").rows``.

    ``dirs`` may be lists of folders too.

    Raises:
        ConfigError: if there is none, with the first reason.
    """
    folders = [
        d for one in dirs for d in (one if isinstance(one, Sequence) and not isinstance(one, str) else [one])
    ]
    if wrong := [d for d in folders if not isinstance(d, str | Path)]:
        raise ConfigError(f"load: got {type(wrong[0]).__name__}, expected the path of a folder")
    return LoadedRuns(load_runs(folders))
