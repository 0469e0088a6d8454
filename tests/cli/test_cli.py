"""The command: exit codes, messages, sweeps, report and verify, over a stand-in for the simulator."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from omegaconf import OmegaConf
from runfolder import make
from standin import Simulator, stand_in

from fedsim.cli import launch, verify  # noqa: F401 - before the stand-ins take the place of what it imports
from fedsim.cli.main import command
from fedsim.errors import ClientError, DataError
from fedsim.run.key import run_dir


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulator:
    return stand_in(monkeypatch, tmp_path)


# ---------------------------------------------------------------- one run


def test_one_run_ends_in_a_table_and_paths(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["engine=serial", "strategy=fedspeed"]) == 0
    (config,) = simulator.ran
    folder = run_dir(config)
    assert config.method == "fedspeed"
    out = capsys.readouterr().out
    assert "table 1 None" in out and f"results: {folder}" in out and f"curves:  {folder}/curves.png" in out
    assert sorted(p.name for p in Path().iterdir()) == ["runs"], "Hydra leaves nothing behind"
    assert [p.name for p in Path("runs/default").iterdir()] == [folder.name]
    assert not (folder / "curves.png").read_text(), "the run draws its own curves"


def test_a_finished_run_is_skipped(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["seed=1"]) == 0
    assert command(["seed=1", "engine=serial"]) == 0
    assert len(simulator.ran) == 1
    assert "already done, skipped: runs/default/fedavg-s1-" in capsys.readouterr().out
    assert command(["seed=1", "resume=never"]) == 0
    assert len(simulator.ran) == 2


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("data.path=x: no such file"), 2, "fedsim: data.path=x: no such file\n"),
        (
            ClientError("client 3, round 2: boom\n  its traceback"),
            1,
            "fedsim: client 3, round 2: boom\n  its",
        ),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError: oops"),
        (KeyboardInterrupt(), 130, "fedsim: interrupted; the same command goes on where it stopped"),
    ],
)
def test_exit_codes(
    simulator: Simulator, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    simulator.errors[0] = error
    assert command(["engine=serial"]) == code
    err = capsys.readouterr().err
    assert text in err
    assert ("Traceback" in err) == isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["strategy=fedsped"], "strategy=fedsped: no such option; nearest is 'fedspeed'"),
        (["client.lrr=1"], "unknown key 'client.lrr'; nearest is 'client.lr'"),
        (["clients_per_round=30"], "clients_per_round=30: must be between 1 and num_clients (20)"),
        (["+x=1"], "unknown key 'x'"),
        (
            ["reprot", "runs"],
            "'reprot' is neither a command (fedsim --help names them; nearest is 'report') nor",
        ),
        (["--config-dir", "nowhere"], "nowhere' not found"),
    ],
)
def test_bad_configuration_stops_before_the_simulator(
    simulator: Simulator, capsys: pytest.CaptureFixture[str], argv: list[str], text: str
) -> None:
    assert command(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("fedsim: ") and text in err and err.count("\n") == 1
    assert not simulator.ran


def test_strategy_from_a_loose_folder(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my_conf/strategy").mkdir(parents=True)
    Path("my_conf/strategy/mine.yaml").write_text("_target_: my_methods.Gossip\nfanout: 3\n")
    monkeypatch.setitem(sys.modules, "my_methods", types.ModuleType("my_methods"))
    assert command(["--config-dir", "my_conf", "strategy=mine", "strategy.fanout=4"]) == 0
    (config,) = simulator.ran
    assert (config.method, config.strategy.fanout) == ("mine", 4)
    assert command(["--config-dir", "my_conf", "strategy=mine", "strategy.fanou=4"]) == 2
    assert "nearest is 'strategy.fanout'" in capsys.readouterr().err
    assert command(["--config-dir", "my_conf", "--help"]) == 0
    assert "mine" in capsys.readouterr().out


# ---------------------------------------------------------------- sweeps


def test_sweep_skips_and_goes_on_after_failures(
    simulator: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["seed=0"]) == 0
    simulator.errors = {1: ClientError("client 3, round 2: boom"), 2: ValueError("odd")}
    assert command(["-m", "strategy=fedavg,fedspeed", "seed=0,1,2"]) == 1
    assert len(simulator.ran) == 1 + 5
    out, err = capsys.readouterr()
    assert "job 0 (seed=0,strategy=fedavg): already done, skipped" in out
    assert "table 2 None" in out and "curves:  runs/default/curves.png" in out
    table = err[err.index("fedsim: 4 of 6 jobs failed") :].splitlines()
    assert table[1].split(maxsplit=2) == ["1", "seed=1,strategy=fedavg", "client 3, round 2: boom"]
    assert table[4].split(maxsplit=2) == ["5", "seed=2,strategy=fedspeed", "ValueError: odd"]
    assert {p.name for p in Path().iterdir()} == {"runs"}


def test_sweep_of_configuration_errors_only(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["-m", "clients_per_round=5,30"]) == 2
    assert len(simulator.ran) == 1
    assert command(["-m", "strategy=fedavg,fedsped"]) == 2
    assert len(simulator.ran) == 1, "a misspelt option is found before the first job"
    assert "nearest is 'fedspeed'" in capsys.readouterr().err


def test_interrupt_ends_a_sweep(simulator: Simulator) -> None:
    simulator.errors[1] = KeyboardInterrupt()
    assert command(["-m", "seed=0,1,2"]) == 130
    assert len(simulator.ran) == 2


# ---------------------------------------------------------------- report, verify, help


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pages: list[Any] = []
    monkeypatch.setattr(
        "fedsim.report.page.write_report",
        lambda groups, frame, out, commands: pages.append((len(groups), out, *commands)) or out / "x.html",
    )
    for seed in (0, 1):
        make(Path("a"), "fedavg", seed, [0.5, 0.9], folder=f"{seed}")
    overrides = {"hydra": {"overrides": {"task": ["seed=0,1", "tags=[x y]"]}}}
    OmegaConf.save(OmegaConf.create(overrides), "a/multirun.yaml")
    assert command(["report", "a/0", "a/1", "--target", "0.9"]) == 0
    table, *paths = capsys.readouterr().out.rsplit("report:  ", 1)
    assert "rounds to 90%" in table and "90.00 ± 0.00" in table
    commands = ("fedsim -m seed=0,1 'tags=[x y]'", "fedsim report a/0 a/1 --target 0.9")
    assert pages == [(1, Path("a/report"), *commands)]
    assert paths[0].splitlines() == [
        "a/report/x.html",
        "tables:  a/report/table.csv, a/report/table.tex, a/report/comparison.json",
        "figures: a/report/*.png",
    ]
    assert command(["report", "a/0", "--out", "elsewhere"]) == 0
    assert pages[1][:2] == (1, Path("elsewhere"))
    assert command(["report", "nowhere"]) == 2
    assert capsys.readouterr().err == "fedsim: nowhere: no such folder\n"
    assert command(["report"]) == 2


def test_verify(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["engine.workers=2"]) == 0
    folder = str(run_dir(simulator.ran[0]))
    capsys.readouterr()
    assert command(["verify", folder]) == 0
    assert capsys.readouterr().out == "3 rounds identical\n"
    assert command(["verify", folder, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(
        document, json.loads((Path(verify.__file__).parent / "verify.schema.json").read_text())
    )
    assert (document["identical"], document["rounds"], document["first_difference"]) == (True, 3, None)
    again = simulator.ran[1]
    assert (again.engine.name, again.engine.workers, again.tracker.console.mode) == ("serial", 1, "quiet")
    assert again.dir != folder and not Path(again.dir).exists()
    simulator.salt = "!"
    assert command(["verify", folder]) == 1
    assert capsys.readouterr().out.startswith("round 2 differs: recorded ")
    assert command(["verify", "runs"]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    text = capsys.readouterr().out
    for part in (
        "strategy            fedavg* ",
        "fedspeed",
        "engine              ray*  flower  serial",
        "130 interrupted",
        "verify RUN",
    ):
        assert part in text
    assert "schema" not in text
    assert max(map(len, text.splitlines())) <= 110
    assert command(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fedsim ")
