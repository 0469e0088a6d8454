"""Epsilon and delta in the report's tables, and what an audit showed beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from runfolder import make

from fedsim.report import compare, group_runs, load_runs
from fedsim.report.budget import budget_table
from fedsim.report.choosing import first_rounds
from fedsim.report.spent import no_bound
from fedsim.report.tables import layout, to_csv

SAID = {
    "level": "client",
    "delta": 1e-3,
    "relation": "add_remove",
    "z": 1.02,
    "private": True,
    "noise": "keyed",
}


def runs(folder: Path) -> list[Any]:
    def row(at: int) -> dict[str, float]:
        return {"epsilon": at, "delta": 1e-3, "z": 1.02}

    for seed, epsilon in ((0, 2.0), (1, 2.5)):
        said = {**SAID, "epsilon": epsilon, "epsilon_valid": seed == 0}
        make(folder, "fedavg", seed, [0.5, 0.6], extra=row, summary={"privacy": said})
    make(folder, "scaffold", 0, [0.5, 0.6])
    return load_runs([folder])


def test_the_table_of_results_has_what_was_spent(tmp_path: Path) -> None:
    frame = compare(runs(tmp_path))
    private, plain = frame.to_dict("records")
    assert private["epsilon_spent"] == 2.5 and private["at_delta"] == 1e-3
    assert math.isnan(plain["epsilon_spent"]) and "no bound" in private["note"]
    content = layout(frame)
    at = content.header.index("epsilon spent")
    assert [row[at].text for row in content.rows] == ["2.5", "-"] and content.header[at + 1] == "at delta"
    assert "epsilon_spent" in to_csv(frame)
    assert "epsilon_spent" not in compare([run for run in runs(tmp_path / "x") if run.method == "scaffold"])


def test_why_epsilon_is_no_bound_is_said(tmp_path: Path) -> None:
    said = {**SAID, "epsilon": 2.0, "epsilon_valid": False}
    groups = ({"where": "distributed"}, {"where": "server", "assume_poisson": True})
    for seed, settings in enumerate(groups):
        make(tmp_path, "fedavg", seed, [0.5], summary={"privacy": said}, privacy=settings)
    shares, coins = (no_bound([run]) for run in load_runs([tmp_path]))
    assert shares == "sums of rounded noise, accounted as one Gaussian"
    assert coins == "cohorts of fixed size, accounted as coins"


def test_the_z_that_a_budget_comes_to_tells_no_methods_apart(tmp_path: Path) -> None:
    for epsilon, found in ((1, 1.8), (2, 1.2)):
        make(tmp_path, "fedavg", 0, [0.5], privacy={"epsilon": epsilon, "found": found, "span": 1})
    labels = [group.label for group in group_runs(load_runs([tmp_path]))]
    assert labels == ["fedavg, epsilon=1", "fedavg, epsilon=2"]


def test_the_page_says_who_is_protected_and_what_an_audit_showed(tmp_path: Path) -> None:
    groups = group_runs(there := runs(tmp_path))
    table = budget_table(groups)
    for text in ("a client", "one more or less", "2.5", "0.001", "1.02", "no bound"):
        assert text in table
    assert "scaffold" not in table and budget_table(groups[1:]) == "" and "the claim is broken" not in table
    for compared, words in (
        (2.5, "the claim is broken"),
        (6.5, "against 6.5, of one replaced"),
        (None, "nothing"),
    ):
        for run, bound in zip(there, (3.0, 9.0), strict=False):
            (run.dir / "audit.json").write_text(
                json.dumps({"epsilon": bound, "compared": compared, "why": "x" if compared == 6.5 else ""})
            )
        table = budget_table(groups)
        assert ">6<" in table and words in table and ("the claim is broken" in table) == (compared == 2.5)
    assert ">1<" in budget_table(group_runs(first_rounds(there, 1)))  # of the rounds that are looked at
