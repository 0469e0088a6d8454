"""What is shown of classes that nobody labelled: in the report, on the terminal, as an objective."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from runfolder import make

from fedsim.report import group_runs, load_runs
from fedsim.report.objective import Objective
from fedsim.report.openclasses import open_table
from fedsim.tracking import RunInfo
from fedsim.tracking.console import ConsoleTracker

LAST = {"all": 0.5, "seen": 0.75, "AU": 0.25, "NMI": 0.125}


def test_the_report_has_a_row_a_method_with_the_last_round_and_the_best(tmp_path: Path) -> None:
    for seed, best in ((0, 0.5), (1, 0.75)):
        make(
            tmp_path,
            "fedossl",
            seed,
            [0.1, 0.1],
            extra=lambda at, best=best: {
                **LAST,
                "all": best if at == 1 else LAST["all"] - 0.25 * (best > 0.6),
            },
        )
    make(tmp_path, "fedavg", 0, [0.1])
    table = open_table(group_runs(load_runs([tmp_path])))
    assert table.count("<tr>") == 2  # names, and the one method that was measured so
    assert "37.5 ± 17.7 (62.5)" in table and "75.0 ± 0.0 (75.0)" in table and "–" in table
    assert open_table(group_runs(load_runs([tmp_path / p for p in ()]))) == ""


def test_the_terminal_shows_them_and_an_objective_takes_one() -> None:
    console = Console(file=io.StringIO(), width=140, record=True)
    tracker = ConsoleTracker("plain", console)
    tracker.start(RunInfo("runs/x", "fedossl-s0", "g", "fedossl", {}, 1, 0))
    tracker.round({"round": 1, "accuracy": 0.5, "loss": 1.0, **LAST}, [])
    assert "all 50.00% seen 75.00% AU 25.00% NMI 12.50%" in console.export_text()
    assert Objective(metric="AU").share and not Objective(metric="LAU").share
