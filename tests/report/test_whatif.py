"""Pricing a finished run on another fleet gives what a run on that fleet would have logged."""

from __future__ import annotations

from pathlib import Path

import pytest
from problems import classification

from fedsim.cli.main import command
from fedsim.errors import ConfigError
from fedsim.report import load_runs
from fedsim.run.whatif import compose_system, reprice

OTHER = ("system.devices.speed=7", "system.devices.compute_watts=3", "system.devices.radio_watts=1")


@pytest.mark.parametrize(
    "method",
    [
        ["strategy=fedsam"],
        ["strategy=scaffold", "strategy.option=1"],
        ["strategy=heterofl", "client.classes=[{share: 1}, {share: 1, width: 0.5}]"],
        ["strategy=gossip", "topology=star", "clients_per_round=6", "strategy.loss=0.2"],
        ["sampling=power_of_choice", "strategy.weighting=uniform"],
    ],
    ids=["fedsam", "scaffold", "heterofl", "gossip", "power_of_choice"],
)
def test_a_run_is_priced_as_if_it_had_been_there(method: list[str]) -> None:
    """Without devices at first, then on some; the link's spread comes from the same draws."""
    problem = classification()
    without = problem.run(*method, "evaluation.clients_every=2", "evaluation.holdout=0.2")
    there = problem.run(
        *method, "evaluation.clients_every=2", "evaluation.holdout=0.2", "system=lognormal", *OTHER
    )
    (run,) = load_runs([without.dir])
    priced = reprice(run, compose_system("lognormal", OTHER))
    for row, expected in zip(priced.rows, there.rows, strict=True):
        assert row["weights_hash"] == expected["weights_hash"]
        assert row["sim_seconds"] == pytest.approx(expected["sim_seconds"], rel=1e-12)
        assert row["joules"] == pytest.approx(expected["joules"], rel=1e-12)


def test_the_command_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = classification().run("system=lognormal")
    (tmp_path / "other.yaml").write_text("defaults:\n  - lognormal\n  - _self_\ndevices:\n  speed: 1.0\n")
    out = ["--out", str(tmp_path / "report")]
    assert command(["report", "--system", str(tmp_path / "other.yaml"), *out, str(result.dir)]) == 0
    assert "sim. s" in capsys.readouterr().out
    assert command(["report", "--system", str(tmp_path / "none.yaml"), *out, str(result.dir)]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recorded", "other", "message"),
    [
        (["strategy=fedbuff", "system=lognormal"], [], "in the order of their virtual times"),
        (["system=lognormal", "system.dropout.before=0.5"], [], "who took part depended on its own devices"),
        (["system=lognormal", "system/availability=random"], [], "who took part depended on its own devices"),
        (["system=lognormal", "sampling=oort"], [], "its sampling rule looked at how long"),
        (
            ["client.classes=[{share: 1}]", "client.classes_by=speed", "system=lognormal"],
            [],
            "classes of clients",
        ),
        (
            [],
            ["system.deadline=3", "system.stragglers=drop"],
            "deadlines, over-selection and dropout would change",
        ),
        ([], ["system/availability=random"], "who comes and goes would take part at other times"),
        ([], ["system.work=flops"], "system.work=flops needs the model, which was handed over in Python"),
    ],
)
def test_what_cannot_be_priced_is_said(recorded: list[str], other: list[str], message: str) -> None:
    result = classification().run(*recorded, "rounds=2")
    (run,) = load_runs([result.dir])
    with pytest.raises(ConfigError, match=message):
        reprice(run, compose_system("lognormal", other))


def test_without_a_client_only_if_it_was_never_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = classification().run("rounds=1", f"dir={tmp_path / 'run'}")
    there = run.rows[0]["cohort"][0]
    never = next(c for c in range(6) if c not in run.rows[0]["cohort"])
    words = ["report", str(run.dir), "--system", "lognormal", "--out", str(tmp_path / "out"), "--exclude"]
    assert command([*words, str(never)]) == 0
    assert command([*words, str(there)]) == 2
    assert f"fedsim forget {run.dir} --client {there}" in capsys.readouterr().err
    assert command(["report", str(run.dir), "--exclude", "1"]) == 2
