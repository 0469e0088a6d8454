"""``fedsim value``: what clients contribute, by runs without some of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedsim
from fedsim.cli.main import command
from fedsim.replay.worth import find, plan
from fedsim.report.objective import Objective

SETTINGS = (
    "engine=serial", "tracker=quiet", "client.epochs=1", "model.hidden=[8]", "rounds=2", "evaluation.validation=0.1",
)  # fmt: skip
LAST = Objective(on="val", metric="loss", at="last")


def base(folder: Path, *more: str) -> Path:
    return fedsim.simulate([*SETTINGS, f"dir={folder}", *more]).dir


def test_shapley_values_sum_to_what_all_achieve(tmp_path: Path) -> None:
    run = base(tmp_path / "run", "num_clients=3", "clients_per_round=3")
    todo = plan(run, "shapley", objective=LAST)
    assert todo.costs() | {"seconds": 0} == {"coalitions": 7, "runs": 7, "done": 1, "todo": 6, "seconds": 0}
    found = find(todo, say=lambda text: None)
    assert found["objective"] == "loss on val, last evaluation"
    said = Objective(on="val").said([1])
    assert said == "accuracy on val, mean of the last 1 evaluation (runs have fewer than 40)"
    assert Objective(on="val").said([10]) == str(Objective(on="val"))
    total = sum(p["value"] for p in found["players"])
    assert total == pytest.approx(found["all"]["0"] - found["nobody"]["0"], abs=1e-9)
    assert plan(run, "banzhaf", objective=LAST).costs()["todo"] == 0  # the same runs
    few = find(plan(run, "shapley", objective=LAST, runs=100), say=lambda text: None)
    assert not few["exact"] and sum(p["value"] for p in few["players"]) == pytest.approx(total, abs=1e-9)


def test_who_is_in_no_cohort_is_worth_exactly_nothing_at_no_cost(tmp_path: Path) -> None:
    for fill in ("substitute", "shrink"):
        run = base(tmp_path / fill / "run", "num_clients=12", "clients_per_round=2", f"exclude_fill={fill}")
        todo = plan(run, objective=LAST)
        drawn = {c for t in todo.base.rows for c in t["cohort"]}
        assert todo.costs()["todo"] == len(drawn) < 12
    found = find(todo, say=lambda text: None)
    assert {int(p["name"]) for p in found["players"] if p["value"] == 0} >= set(range(12)) - drawn
    assert any(p["value"] for p in found["players"])


def test_over_seeds_there_are_intervals_and_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = base(tmp_path / "run", "num_clients=2", "clients_per_round=2", "rounds=1")
    words = ["value", str(run), "--seeds", "0-2", "--objective", "val/accuracy"]
    assert command([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["todo"] == 8  # all and each alone, without what is there
    assert command([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seeds"] == [0, 1, 2] and all(p["low"] <= p["value"] <= p["high"] for p in found["players"])
    assert {p["verdict"] for p in found["players"]} <= {"better", "worse", "equivalent", "undecided"}
    assert command(words) == 0
    text = capsys.readouterr().out
    assert "mean of the last 1 evaluation (runs have fewer than 40), 3 seeds" in text
    assert "9 runs: 9 there, 0 to compute" in text and "leave-one-out values points" in text


def test_groups_are_players_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = base(tmp_path / "run", "num_clients=5", "clients_per_round=5", "rounds=1")
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"north": [0, 1], "south": [2]}))
    assert command(["value", str(run), "--banzhaf", "--players", str(groups), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["clients"] for p in found["players"]] == [[0, 1], [2]] and found["runs"]["coalitions"] == 3
    groups.write_text(json.dumps({"north": [0, 1], "south": [1]}))
    assert command(["value", str(run), "--players", str(groups)]) == 2
    assert command(["value", str(run), "--players", "nowhere.json"]) == 2


def test_what_cannot_be_valued_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = base(
        tmp_path / "run", "num_clients=9", "clients_per_round=2", "rounds=1", "evaluation.validation=0"
    )
    assert command(["value", str(run)]) == 2
    assert "evaluation.validation=0.1" in capsys.readouterr().err
    assert command(["value", str(run), "--shapley", "--objective", "accuracy"]) == 2
    assert "--runs B" in capsys.readouterr().err
    assert command(["value", str(run), "--seeds", "1,1", "--objective", "accuracy"]) == 2


@pytest.mark.slow
def test_runs_at_once_are_the_same_runs(tmp_path: Path) -> None:
    values = []
    for workers in (1, 2):
        run = base(tmp_path / str(workers) / "run", "num_clients=3", "clients_per_round=2", "rounds=1")
        found = find(plan(run, objective=LAST), workers, say=lambda text: None)
        values.append([p["value"] for p in found["players"]])
    assert values[0] == values[1]
