"""``fedsim tune``: equal budgets on validation data, edges, winners on fresh seeds, the same record after a kill."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from composing import compose_quickly

from fedsim.cli import campaign
from fedsim.cli.campaign import Campaign
from fedsim.cli.main import command
from fedsim.tracking import read_rows

SCHEMA = Path(campaign.__file__).with_name("tune.schema.json")
BASE = [
    *("data=blobs", "data.num_samples=120", "data.num_test=30", "model=linear", "engine=serial", "rounds=4"),
    *("num_clients=3", "clients_per_round=2", "client.batch_size=16", "client.epochs=1", "name=t"),
    *("tracker=quiet", "tracker.plots=false"),
]
TWO = ["strategy=fedavg,fedprox", "client.lr=0.01,0.1", "fedprox:strategy.mu=0.01,0.1"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A folder of its own; the report, which draws for seconds, is seen by one test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedsim.cli.request.compose", compose_quickly)
    if "fresh_seeds" not in request.node.name:
        monkeypatch.setattr(campaign, "conclude", lambda folders, root: print("the final table"))


def record() -> dict[str, Any]:
    """The record, which is as published."""
    found: dict[str, Any] = json.loads(Path("runs/t/tune.json").read_text())
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    return found


def test_methods_get_equal_trials_and_winners_fresh_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["tune", *TWO, *BASE, "--seeds", "0,1", "--final-seeds", "5-6"]) == 0
    out = capsys.readouterr().out
    assert "evaluation.validation=0.1: set, since trials are chosen by validation data" in out
    found = record()
    assert found["budget"] == 2 and found["seeds"] == [0, 1] and found["final_seeds"] == [5, 6]
    for method in found["methods"]:
        assert len(method["trials"]) == 2 and method["objective"]["on"] == "val"
        assert sorted(t["rank"] for t in method["trials"]) == [1, 2]
        winner = method["trials"][method["winner"]]
        assert winner["rank"] == 1 and winner["score"] == max(t["score"] for t in method["trials"])
        for trial in method["trials"]:
            assert trial["score"] == pytest.approx(sum(trial["scores"].values()) / 2)
            for seed, folder in trial["folders"].items():
                rows = read_rows(Path("runs/t") / folder / "metrics.jsonl")
                assert trial["scores"][seed] == rows[-1]["val/accuracy"]  # 4 evaluations: mean:10 takes one
        assert set(method["final"]) == {"5", "6"}
        assert all((Path("runs/t") / f / "weights.safetensors").exists() for f in method["final"].values())
    assert Path("runs/t/report/report.html").exists()
    assert out.count("is the largest tried") + out.count("is the smallest tried") >= 2 * len(found["methods"])


def test_a_grid_that_is_too_small_is_run_in_full_and_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["tune", *TWO, *BASE, "--trials", "3", "--final-seeds", "5"]) == 0
    assert "fedavg: 2 of 3 trials, its grid is exhausted" in capsys.readouterr().out
    assert [len(m["trials"]) for m in record()["methods"]] == [2, 3]


@pytest.mark.parametrize("after", [1, 5])
def test_killed_and_repeated_it_writes_the_same_bytes(
    after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", *TWO, *BASE, "--trials", "2", "--final-seeds", "5"]
    plain, done = Campaign._trial, 0

    def killed(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal done
        if done == after:
            raise KeyboardInterrupt
        done += 1
        return plain(self, *args, **more)

    with monkeypatch.context() as during:
        during.setattr(Campaign, "_trial", killed)
        assert command(words) == 130
    assert command(words) == 0
    first = Path("runs/t/tune.json").read_bytes()
    capsys.readouterr()
    assert command([*words, "--json"]) == 0
    assert capsys.readouterr().out.encode() == first == Path("runs/t/tune.json").read_bytes()
    assert command([*words[:-4], "out=elsewhere", *words[-4:]]) == 0
    assert json.loads(Path("elsewhere/t/tune.json").read_text())["methods"] == json.loads(first)["methods"]


def test_test_data_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["tune", *TWO, *BASE, "--final-seeds", "5"]
    assert command(words) == 0
    first = Path("runs/t/tune.json").read_bytes()
    for path in Path("runs/t").glob("*/metrics.jsonl"):
        rows = read_rows(path)
        path.write_text(
            "".join(json.dumps({**r, "accuracy": 1.0 - r["accuracy"], "loss": 9.0}) + "\n" for r in rows)
        )
    assert command(words) == 0
    assert Path("runs/t/tune.json").read_bytes() == first


def scored(monkeypatch: pytest.MonkeyPatch, worth: Any) -> list[str]:
    """Let runs cost nothing, and be worth ``worth(settings)``; None: the run fails."""
    asked: list[str] = []

    def do(self: Any, search: Any, point: Any, seeds: Any, score: bool = True) -> Any:
        from fedsim.cli.trials import Trial

        settings = dict(zip((a.key for a in search.space.axes), point, strict=True))
        asked.append(" ".join([search.space.method, *point]))
        value = worth(search.space.method, settings)
        self.codes += [0 if value is not None else 1] * len(seeds)
        reason = None if value is not None else "broke"
        folders = dict.fromkeys(seeds, "x") if value is not None else {}
        return Trial(point, dict.fromkeys(seeds, value) if score else {}, folders, reason)

    monkeypatch.setattr(Campaign, "_trial", do)
    return asked


def test_edges_are_said_after_the_trials_and_under_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(monkeypatch, lambda method, s: 0.5 + float(s["client.lr"]) - float(s["client.momentum"]))
    words = ["tune", "client.lr=0.01,0.03,0.1", "client.momentum=0,0.5,0.9", *BASE]
    assert command(words) == 0
    high = "fedavg: client.lr=0.1 is the largest tried (score still rising from 0.03); try 0.3"
    low = (
        "fedavg: client.momentum=0 is the smallest tried (score still rising from 0.5); -0.5 is not possible"
    )
    out = capsys.readouterr().out
    before, _, after = out.partition("the final table")
    assert high in before and high in after and low in before and low in after
    assert record()["methods"][0]["edges"] == [high, low]
    scored(monkeypatch, lambda method, s: -abs(float(s["client.lr"]) - 0.03))
    assert command(["tune", "client.lr=0.01,0.03,0.1", *BASE]) == 0
    assert "tried" not in capsys.readouterr().out


def test_steps_beyond_edges_are_the_same_number_for_all_methods(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = scored(monkeypatch, lambda m, s: -abs(float(s.get("client.lr", 0)) - 0.4))
    own = [
        "fedprox:client.lr=0.1",
        "fedprox:client.shuffle=true,false",
        "fedprox:client.decoupled=true,false",
    ]
    words = ["tune", "strategy=fedavg,fedprox", "client.lr=0.01,0.03,0.1", *own, *BASE]
    assert command([*words, "--extend", "5"]) == 0
    found = record()
    rates = [t["overrides"]["client.lr"] for t in found["methods"][0]["trials"]]
    assert rates == ["0.01", "0.03", "0.1", "0.3", "0.9"]  # then 0.3 lies inside
    assert found["methods"][0]["winner"] == 3 and found["methods"][0]["edges"] == []
    assert found["budget"] == 5 and len(found["methods"][1]["trials"]) == 4  # the point that was left out
    assert "fedprox: 4 of 5 trials, its grid is exhausted" in capsys.readouterr().out
    assert len(asked) == len(set(asked)) + 2  # the winners once more, on fresh seeds


def test_failed_trials_are_worst_and_counted_and_ties_go_to_the_earlier(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worth = {"0.01": 0.2, "0.03": None, "0.1": 0.2, "0.3": 0.1}
    scored(monkeypatch, lambda m, s: worth[s["client.lr"]])
    assert (
        command(["tune", "client.lr=0.01,0.03,0.1,0.3", *BASE]) == 1
    )  # a run failed, the others are compared
    (method,) = record()["methods"]
    assert [t["rank"] for t in method["trials"]] == [1, 4, 2, 3] and method["winner"] == 0
    assert method["unscored"] == 1 and method["trials"][1]["reason"] == "broke"
    assert "fedavg: 1 of 4 trials failed or not finite, ranked last" in capsys.readouterr().out
    scored(monkeypatch, lambda m, s: None)
    assert command(["tune", "client.lr=0.01,0.03", *BASE]) == 1
    assert record()["methods"][0]["winner"] is None and record()["methods"][0]["final"] == {}


def test_less_is_better_where_the_objective_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, lambda m, s: float(s["client.lr"]))
    assert command(["tune", "client.lr=0.03,0.01,0.1", "objective.metric=loss", *BASE]) == 0
    (method,) = record()["methods"]
    assert method["trials"][method["winner"]]["overrides"] == {"client.lr": "0.01"}
    assert "score still falling from 0.03" in method["edges"][0]


def test_a_run_that_is_not_finite_or_fails_is_worst(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["client.lr=0.1,1e38", "client.clip_norm=null", "failures.nonfinite=stop", "--final-seeds", "5"]
    assert command(["tune", *words, *BASE]) == 1
    (method,) = record()["methods"]
    assert method["winner"] == 0 and method["trials"][1]["score"] is None and method["trials"][1]["reason"]
    assert set(method["final"]) == {"5"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0,1", "--final-seeds", "1-3"], "1 chose the winners already"),
        (["--trials", "0"], "--trials 0: must be at least 1"),
        (["seed=3"], "seed=3: type --seeds"),
        (["dir=x"], "dir=x: type"),
        (["client.nonsense=1"], "nonsense"),
        (["client.epochs=0,1"], "client.epochs=0: must be at least 1"),
        (
            ["objective.metric=acuracy", "--final-seeds", "5"],
            "acuracy: no run has measured it; nearest is 'val/accuracy'",
        ),
        (["--sampler", "best"], "--sampler"),
        (["client.momentum=interval(0,0.5)", "client.lr=interval(0.1,0.2)"], "type --trials N"),
    ],
)
def test_what_is_wrong_is_said_before_anything_else(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lr = [] if any("client.lr" in w for w in words) else ["client.lr=0.1,0.3"]
    assert command(["tune", *lr, *BASE, *words, "--json"]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.out == ""
    assert not Path("runs/t/tune.json").exists()


def test_only_validation_is_shown_until_the_winners_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [w for w in BASE if w != "tracker=quiet"] + ["tracker.console.mode=plain", "--final-seeds", "5"]
    assert command(["tune", "client.lr=0.01,0.1", *lines]) == 0
    out = capsys.readouterr().out
    trials, chosen, final = out.partition("best of 2 trials")
    assert "val/accuracy" in trials and chosen
    assert not re.search(r"(?<!/)(accuracy|loss) \d", trials) and re.search(r" accuracy \d", final)
    assert "mean of the last 1 evaluation (runs have fewer than 40): " in trials


def test_a_dry_run_says_which_values_no_trial_would_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["tune", "client.lr=0.01,0.1", *BASE, "--trials", "1", "--dry-run"]) == 0
    assert "was in none of 1 trials; raise --trials" in capsys.readouterr().out


def test_a_dry_run_counts_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", *TWO, *BASE, "--seeds", "0,1", "--final-seeds", "5"]
    assert command([*words, "--dry-run"]) == 0
    assert "10 runs in all with the winners' on 1 fresh seeds, 0 done" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert command([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["runs"], plan["done"], plan["budget"]) == (10, 0, 2)


def test_optuna_is_asked_for_as_many_trials_and_repeats_itself() -> None:
    pytest.importorskip("optuna")
    words = ["tune", "strategy=fedavg,fedprox", "client.lr=tag(log,interval(0.01,1))", *BASE]
    words += ["--sampler", "optuna", "--trials", "3", "--final-seeds", "5"]
    assert command(words) == 0
    first = Path("runs/t/tune.json").read_bytes()
    assert [len(m["trials"]) for m in record()["methods"]] == [3, 3] and record()["sampler"] == "optuna"
    assert command(words) == 0
    assert Path("runs/t/tune.json").read_bytes() == first


def test_without_optuna_its_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedsim.cli.trials.find_spec", lambda name: None)
    assert command(["tune", "client.lr=0.1,0.3", *BASE, "--sampler", "optuna"]) == 2
    assert "pip install 'fedsim-lab[tune]'" in capsys.readouterr().err
