"""The command: exit codes, messages, sweeps, report and verify, over a stand-in for the simulator."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from fedsim.cli.main import command
from fedsim.errors import ClientError, DataError
from fedsim.report import terminal
from fedsim.run.key import run_dir, run_key


class Simulator:
    """Stand-in for ``fedsim.api``: writes a run folder at once, or fails as it was told."""

    def __init__(self) -> None:
        self.errors: dict[int, BaseException] = {}  # by seed
        self.ran: list[DictConfig] = []
        self.salt = ""

    def run(self, config: DictConfig) -> SimpleNamespace:
        self.ran.append(config)
        if config.seed in self.errors:
            raise self.errors[config.seed]
        folder = run_dir(config)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        hashes = [run_key(config)[:8] + (self.salt if r == 2 else "") for r in range(1, 4)]
        rows = [{"round": r, "weights_hash": h} for r, h in enumerate(hashes, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "curves.png").touch()
        summary = {"status": "done", "accuracy": 0.5}
        (folder / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(dir=folder, summary=summary)


class Named(str):
    """A run that is known by its folder."""

    @property
    def dir(self) -> Path:
        return Path(self)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulator:
    """The stand-in and one for ``fedsim.report``, in an empty working directory."""
    stand_in = Simulator()
    report = SimpleNamespace(
        compare=lambda runs, target=None: (len(runs), target),
        group_runs=lambda runs: [",".join(runs)],
        print_table=lambda table: print("table", *table),
        heterogeneity=SimpleNamespace(lines=lambda groups: ()),
        draw_curves=lambda runs, path: path.write_text(" ".join(runs)),
    )
    report.load_runs = lambda dirs: [Named(str(d)) for d in dirs]
    page = SimpleNamespace(
        write_report=lambda groups, frame, out, commands: (
            print("page", *groups, out, *commands) or out / "x.html"
        )
    )
    runs = SimpleNamespace(load_runs=report.load_runs)
    cluster = SimpleNamespace(warm_up=lambda config: None, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "fedsim.api", stand_in)
    monkeypatch.setitem(sys.modules, "fedsim.report", report)
    monkeypatch.setitem(sys.modules, "fedsim.report.runs", runs)
    monkeypatch.setitem(sys.modules, "fedsim.report.terminal", terminal)
    monkeypatch.setitem(sys.modules, "fedsim.report.page", page)
    monkeypatch.setitem(sys.modules, "fedsim.engine.ray.cluster", cluster)
    monkeypatch.chdir(tmp_path)
    return stand_in


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
        (["reprot", "runs"], "'reprot' is neither a command (report, verify) nor a setting"),
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


def test_report(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a/b").mkdir(parents=True)
    Path("a/c").mkdir()
    overrides = {"hydra": {"overrides": {"task": ["seed=0,1", "tags=[x y]"]}}}
    OmegaConf.save(OmegaConf.create(overrides), "a/multirun.yaml")
    assert command(["report", "a/b", "a/c", "--target", "0.9"]) == 0
    table, page, *paths = capsys.readouterr().out.splitlines()
    assert table == "table 2 0.9"
    commands = "fedsim -m seed=0,1 'tags=[x y]' fedsim report a/b a/c --target 0.9"
    assert page == f"page a/b,a/c a/report {commands}"
    assert paths == [
        "report:  a/report/x.html",
        "tables:  a/report/table.csv, a/report/table.tex",
        "figures: a/report/*.png",
    ]
    assert command(["report", "a/b", "--out", "elsewhere"]) == 0
    assert "page a/b elsewhere" in capsys.readouterr().out
    assert command(["report", "nowhere"]) == 2
    assert capsys.readouterr().err == "fedsim: nowhere: no such folder\n"
    assert command(["report"]) == 2


def test_verify(simulator: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["engine.workers=2"]) == 0
    folder = str(run_dir(simulator.ran[0]))
    capsys.readouterr()
    assert command(["verify", folder]) == 0
    assert capsys.readouterr().out == "3 rounds identical\n"
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


# ---------------------------------------------------------------- search


def test_optuna_sees_the_accuracy_of_each_trial_also_of_those_done_before(simulator: Simulator) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra 'sweep'")
    argv = ["-m", "experiment=search", "engine=serial", "hydra.sweeper.n_trials=3", "client.epochs=2"]

    def best() -> Any:
        return OmegaConf.load(next(Path("runs").rglob("optimization_results.yaml")))

    assert command(argv) == 0
    tried = [(c.client.lr, c.client.weight_decay) for c in simulator.ran]
    assert len({lr for lr, _ in tried}) == 3 and all(0.005 <= lr <= 0.5 for lr, _ in tried)
    assert {c.client.epochs for c in simulator.ran} == {2}
    assert best().best_value == 0.5 and best().best_params["client.lr"] in [lr for lr, _ in tried]
    assert command(argv) == 0
    assert len(simulator.ran) == 3, "the same seed proposes the same trials, which are done"
    assert best().best_value == 0.5
