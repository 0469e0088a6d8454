"""What ``tune.json`` beside runs says of them: which were trials, by which settings were chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedsim.report.blocks import ProblemBlock

RECORD = "tune.json"


def trials(folder: Path) -> set[Path]:
    """The run folders in ``folder`` that were trials of ``fedsim tune``; none where there is no record of it."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        methods = json.loads((folder / RECORD).read_text(encoding="utf-8"))["methods"]
        names = [name for one in methods for trial in one["trials"] for name in trial["folders"].values()]
        return {(folder / name).resolve() for name in names}
    return set()


def said(blocks: Sequence[ProblemBlock]) -> list[str]:
    """A line where trials are among the runs: their numbers chose the settings, so they are no results."""
    runs = [run for block in blocks for arm in block.setting.arms for run in arm.group.runs]
    parents = dict.fromkeys(run.dir.parent for run in runs)
    chose = {folder for parent in parents for folder in trials(parent)}
    seeds = sorted({run.seed for run in runs if run.dir.resolve() in chose})
    others = sorted({run.seed for run in runs if run.dir.resolve() not in chose})
    if not seeds:
        return []
    rest = (
        f"; results: --where seed={','.join(map(str, others))}" if not {*seeds} & {*others} and others else ""
    )
    places = ", ".join(dict.fromkeys(path.parent.name for path in chose))
    return [
        f"{places}, seeds {', '.join(map(str, seeds))}: trials of fedsim tune, which chose settings by them{rest}"
    ]
