"""The command: exit codes, messages, sweeps, report and verify, over a stand-in for the simulator."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from fedsim.cli import command
from fedsim.errors import ClientError, DataError
from fedsim.settings import run_dir, run_key
from fedsim.sweep import RaySweep

ROOT = Path(__file__).parent.parent


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
    monkeypatch.setitem(sys.modules, "fedsim.report.page", page)
    monkeypatch.setitem(sys.modules, "fedsim.engine.cluster", cluster)
    monkeypatch.chdir(tmp_path)
    return stand_in


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python process that has not been prepared yet."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)


def fedsim(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real command, in its own process."""
    return python("-m", "fedsim.cli", *argv, cwd=cwd)


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


def test_ray_sweep_starts_ray_only_for_jobs_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        started.append(options)
        return SimpleNamespace(address_info={"address": "1.2.3.4:5"})

    ray = SimpleNamespace(init=init, shutdown=lambda: None, is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def sweep(launcher: dict[str, int], engine: str, *task: str) -> str | None:
        config = OmegaConf.create(
            {
                "engine": {"name": engine, "workers": 3, "store_mb": 7},
                "hydra": {"launcher": launcher, "overrides": {"task": list(task)}},
            }
        )
        callback = RaySweep()
        callback.on_multirun_start(config)
        address = os.environ.get("RAY_ADDRESS")
        callback.on_multirun_end(config)
        assert "RAY_ADDRESS" not in os.environ
        return address

    assert sweep({}, "ray") is None
    assert sweep({"n_jobs": 2}, "serial") is None
    assert sweep({"n_jobs": 2}, "ray", "engine=serial") is None
    assert not started
    assert sweep({"n_jobs": 2}, "serial", "engine=serial,ray") == "1.2.3.4:5"
    assert sweep({"n_jobs": 2}, "ray") == "1.2.3.4:5"
    assert started[-1]["num_cpus"] >= 6 and started[-1]["object_store_memory"] == 7 * 2**20


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


# ---------------------------------------------------------------- its own process


def test_process_errors_and_flags(tmp_path: Path) -> None:
    bad = fedsim("strategy.rhoo=1", "strategy=fedspeed", cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "fedsim: unknown key 'strategy.rhoo'; nearest is 'strategy.rho'\n"
    shown = fedsim("--cfg", "job", "--package", "client", "client.lr=0.25", cwd=tmp_path)
    assert shown.returncode == 0 and "lr: 0.25" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_process_restarts_itself_for_malloc_and_stays_light(tmp_path: Path) -> None:
    code = (
        "import os, sys, fedsim.cli as c; c._prepare_process(); c.command(['--help']);"
        "print(os.environ['MALLOC_TRIM_THRESHOLD_'], {'torch', 'ray', 'pandas'} & set(sys.modules))"
    )
    run = python("-c", code, cwd=tmp_path)
    assert run.stdout.splitlines()[-1] == "4294967296 set()", run.stderr


@pytest.mark.slow
def test_a_real_run_is_verified_and_resumed_by_the_same_command(tmp_path: Path) -> None:
    argv = ["engine=serial", "rounds=2", "dir=here", "client.epochs=1"]
    first = fedsim(*argv, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "results: here" in first.stdout and "curves:  here/curves.png" in first.stdout
    assert "already done, skipped: here" in fedsim(*argv, cwd=tmp_path).stdout
    assert fedsim("verify", "here", cwd=tmp_path).stdout.endswith("2 rounds identical\n")
    other = fedsim(*argv, "seed=1", cwd=tmp_path)
    assert other.returncode == 2 and other.stderr.startswith("fedsim: "), (
        "another run's folder is not touched"
    )
    unknown = fedsim(*argv, "+strategy.foo=1", "resume=never", cwd=tmp_path)
    assert unknown.returncode == 2 and "foo" in unknown.stderr and "Traceback" not in unknown.stderr


@pytest.mark.slow
def test_wheel_holds_the_configuration_tree(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, the build backend, is not installed")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    python("-m", "pip", "wheel", str(ROOT), *options, cwd=tmp_path).check_returncode()
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "conf").rglob("*.yaml")}
    expected |= {f"{package}/py.typed" for package in ("fedsim", "strategies", "clients")}
    assert expected | {"fedsim/report/page.html"} <= names


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
