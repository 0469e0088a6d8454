"""Runs on the terminal: the table, and where everything lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def show(dirs: Sequence[Path], draw: bool = True) -> None:
    """Print the table of the runs in ``dirs``, draw their curves, and say where everything lies.

    Without ``draw`` only curves that are there already are named.
    """
    from fedsim.report import clients_plan, compare, default_plan, draw_curves, print_table
    from fedsim.report.runs import load_runs

    runs = load_runs(dirs)
    print_table(compare(runs))
    if (plan := clients_plan(runs, default_plan(runs))) is not None:
        print_table(compare(runs, plan=plan))
    path = common_folder(dirs) / "curves.png"
    if draw:
        draw_curves(runs, path)
    for folder in dirs:
        print(f"results: {folder}")
    if path.exists():
        print(f"curves:  {path}", flush=True)


def common_folder(dirs: Sequence[Path]) -> Path:
    """The innermost folder that holds all of them, relative to the working directory if it lies there."""
    common = Path(os.path.commonpath([d.absolute() for d in dirs]))
    return common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common
