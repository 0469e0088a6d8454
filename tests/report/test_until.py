"""The first rounds of runs alone, and settings that were swept: what is shown of runs beside their whole tables."""

import json

import pytest
from runfolder import make

from fedsim.cli.main import command
from fedsim.errors import ConfigError
from fedsim.report import blocks, clientpoints, compare, load_runs
from fedsim.report.choosing import first_rounds
from fedsim.report.metriccurves import draw_metric, figure_of_metric
from fedsim.report.objective import Objective
from fedsim.report.tables import layout, to_markdown

LAST = blocks.ComparisonPlan(Objective(at="last"))


def test_runs_of_different_length_are_one_problem_up_to_the_shorter(tmp_path, capsys):
    for seed in range(3):
        rising = [at / 100 + seed / 1000 for at in range(50)]
        make(tmp_path, "fedavg", seed, rising[:30], rounds=30)
        status = "failed" if seed == 2 else "done"
        make(
            tmp_path,
            "x",
            seed,
            [v + 0.1 for v in rising[: 40 if seed == 2 else 50]],
            rounds=50,
            status=status,
        )
    runs = load_runs([tmp_path])
    assert [len(b.setting.arms) for b in blocks.blocks_of(runs, LAST)] == [1, 1]
    (block,) = blocks.blocks_of(first_rounds(runs, 30), LAST)
    assert block.setting.problem["rounds"] == 30
    (c,) = block.comparisons
    assert c.seeds == (0, 1, 2) and c.mean == pytest.approx(0.1) and c.verdict == "better"
    frame = compare(first_rounds(runs, 30))
    assert list(frame["megabytes"]) == [90, 90] and list(frame["n"]) == [3, 3]
    assert len(blocks.blocks_of(first_rounds(runs, 45), LAST)) == 2  # 30 rounds are not 45
    assert command(["compare", str(tmp_path), "--until", "30", "--at", "last", "--expect", "x better"]) == 0
    assert "30 rounds" in capsys.readouterr().out
    out = tmp_path / "out"
    assert command(["report", str(tmp_path), "--until", "30", "--out", str(out), "--format", "csv"]) == 0
    (written,) = json.loads((out / "comparison.json").read_text())["blocks"]
    assert written["problem"]["rounds"] == 30 and "--until" in (out / "report.html").read_text()


def test_clients_are_those_of_the_last_round_that_is_read(tmp_path):
    rows = [(at, 0, "evaluate/accuracy", at / 10) for at in (1, 2, 3)]
    make(tmp_path, "fedavg", 0, [0.1] * 3, clients=rows, rounds=3)
    (run,) = first_rounds(load_runs([tmp_path]), 2)
    assert clientpoints.last(run, "accuracy") == {"evaluate/accuracy": {0: 0.2}}


def test_the_objective_against_a_setting_that_was_swept(tmp_path):
    for seed in range(2):
        for lr in (0.001, 0.01, 0.1):
            for method in ("fedavg", "x"):
                value = 0.5 + lr + seed / 10 + 0.2 * (method == "x")
                make(tmp_path, method, seed, [value], client={"lr": lr, "epochs": 1})
    found = blocks.blocks_of(load_runs([tmp_path]), LAST)
    assert draw_metric(found, LAST, "client.lr").startswith(b"\x89PNG")
    (axes,) = figure_of_metric(found, LAST, "lr").axes
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "lr" and axes.get_ylabel() == "accuracy, %"
    first, second = axes.containers
    assert [first.get_label(), second.get_label()] == ["fedavg", "x"]
    assert list(first.lines[0].get_xdata()) == [0.001, 0.01, 0.1]
    assert list(first.lines[0].get_ydata()) == pytest.approx([55.1, 56, 65])
    with pytest.raises(ConfigError, match=r"--curves client.rl: .* nearest is 'client.lr'"):
        draw_metric(found, LAST, "client.rl")
    with pytest.raises(ConfigError, match="nor one setting in which runs differ"):
        draw_metric(found, LAST, "client.epochs")


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ("initial_hash", "initial weights differ"),
        ("uploads_hash", "one-shot methods began with other models of the clients"),
    ],
)
def test_other_beginnings_are_noted(tmp_path, fact, said):
    for seed in range(3):
        for method in ("fedavg", "x"):
            make(tmp_path, method, seed, [0.5 + seed / 10], summary={fact: f"{method}{seed}"})
    (block,) = blocks.blocks_of(load_runs([tmp_path]), LAST)
    assert said in block.comparisons[0].notes


@pytest.mark.parametrize("busy", [False, True])
def test_seconds_of_busy_machines_are_grey_and_not_ranked(tmp_path, busy):
    for method, seconds in (("fedavg", 1), ("x", 2)):
        extra = lambda at, seconds=seconds: {"seconds": seconds}  # noqa: E731
        folder = make(tmp_path, method, 0, [0.5], extra=extra, folder=method)
        entry = {"host": {"class": "a", "cores": 4}, "load": {"start": 0.5, "end": 5.0 if busy else 0.5}}
        (folder / "provenance.json").write_text(json.dumps([entry]))
    frame = compare(load_runs([tmp_path]), columns=["seconds"])
    content = layout(frame)
    assert [row[-1].mark for row in content.rows] == (["grey", "grey"] if busy else ["best", ""])
    assert any("seconds: not ranked" in line for line in content.below) == busy
    assert ("**" in to_markdown(content)) != busy
