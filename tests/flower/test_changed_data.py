"""Runs that go on under ``failures.policy=skip`` while nodes came back with other data, or as they should have been."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_contract import AGREED, HEAD, HOSPITALS, hospitals, laid

from fedsim.flower import nodes as nodes_module


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    monkeypatch.setattr(nodes_module, "AGAIN", 0.1)


def test_a_client_whose_data_changed_fails_alone_until_they_are_back(tmp_path: Path) -> None:
    """And what was agreed on stays what it was, so that nobody else is normalised otherwise."""
    nodes, more = laid(tmp_path, *HOSPITALS), (AGREED, "clients_per_round=3", "failures.policy=skip")
    hospitals(tmp_path, *more, nodes=nodes)
    agreed = json.loads((tmp_path / "run/contract.json").read_text())
    (tmp_path / "h1.csv").write_text("\n".join([HEAD, *HOSPITALS[1][:-1]]) + "\n")
    run, _ = hospitals(tmp_path, *more, "rounds=3", nodes=nodes)
    assert [[f["client"] for f in row["failures"]] for row in run.rows] == [[], [], [1]]
    assert "its data are others than when the run began" in run.rows[2]["failures"][0]["reason"]
    told = json.loads((tmp_path / "run/contract.json").read_text())
    assert {k: told[k] for k in ("normalize", "moments", "held")} == {
        k: agreed[k] for k in ("normalize", "moments", "held")
    }
    (tmp_path / "h1.csv").write_text("\n".join([HEAD, *HOSPITALS[1]]) + "\n")
    run, _ = hospitals(tmp_path, *more, "rounds=4", nodes=nodes)
    assert [[f["client"] for f in row["failures"]] for row in run.rows] == [[], [], [1], []]


def test_a_run_that_began_without_a_client_goes_on_without_it(tmp_path: Path) -> None:
    more = (AGREED, "clients_per_round=2", "failures.policy=skip")
    nodes = laid(tmp_path, *HOSPITALS[:2], [*HOSPITALS[2], "2,200,50,malign"])
    hospitals(tmp_path, *more, nodes=nodes)
    (tmp_path / "h2.csv").write_text("\n".join([HEAD, *HOSPITALS[2]]) + "\n")
    run, _ = hospitals(tmp_path, *more, "rounds=3", nodes=nodes)
    assert [row["cohort"] for row in run.rows] == [[0, 1]] * 3
