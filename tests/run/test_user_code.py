"""An edited method, model or loss of the user's is another run: handed over in Python, or named on the command line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from omegaconf import OmegaConf
from problems import classification, hashes, method, network
from torch import nn

import fedsim
from clients.base import Client
from fedsim.cli.main import command
from fedsim.config.compose import load
from fedsim.config.words import last_of_each
from fedsim.errors import CheckpointError, ConfigError
from fedsim.run.key import finished, run_dir, run_key
from fedsim.run.resolve import resolve

METHOD = """
from clients.sgd import SGDClient
from strategies.fedavg import FedAvg

class Local(SGDClient):
    factor = 1.0
    def step(self, job, w, batch):
        return job.descend(w, batch) * self.factor

class Mine(FedAvg):
    def make_client(self):
        return Local(weighting=self.weighting)
"""
SETTINGS = [
    *("strategy._target_=mymethod.Mine", "data=blobs", "partition=iid", "model=linear", "engine=serial"),
    *("data.num_samples=64", "data.num_test=16", "num_clients=2", "clients_per_round=2", "rounds=1"),
    *("client.epochs=1", "client.batch_size=16", "tracker=quiet", "tracker.plots=false"),
]


def weighted(by: float) -> Any:
    return lambda output, y: by * nn.functional.cross_entropy(output, y)


def client(step: Any) -> Any:
    strategy = method("fedavg")
    strategy.client = type("Mine", (Client,), {"step": step})()
    return strategy


ReLU = network()
ReLU[1] = nn.ReLU()


@pytest.mark.parametrize(
    ("part", "one", "same", "other"),
    [
        ("loss", weighted(1.0), weighted(1.0), weighted(0.5)),
        ("model", network(), network(), ReLU),
        (
            "strategy",
            client(lambda self, job, w, batch: job.descend(w, batch)),
            client(lambda self, job, w, batch: job.descend(w, batch)),
            client(lambda self, job, w, batch: w - job.grad(w, batch)),
        ),
    ],
)
def test_another_part_handed_over_is_another_run(
    tmp_path: Path, part: str, one: Any, same: Any, other: Any
) -> None:
    def run(thing: Any) -> fedsim.RunResult:
        return classification().run("rounds=1", f"dir={tmp_path}", **{part: thing})

    first = run(one)
    assert hashes(run(same)) == hashes(first)
    told = "belongs to another configuration.*; other things, or other code, were handed over in Python"
    with pytest.raises(CheckpointError, match=told):
        run(other)


def test_what_cannot_be_told_apart_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:

        def loss(output: Any, y: Any) -> Any:
            file.write("once\n")
            return nn.functional.cross_entropy(output, y)

        classification().run("rounds=1", loss=loss)
        with pytest.raises(
            ConfigError, match=r"loss: _io.TextIOWrapper \(closure variable 'file' of .*loss\)"
        ):
            classification().run("rounds=1", f"dir={tmp_path}", loss=loss)


@pytest.fixture
def mymethod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a method of the user's, which is imported anew by each run, as by a new process."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "mymethod.py"
    path.write_text(METHOD)
    yield path
    sys.modules.pop("mymethod", None)


def fresh(*overrides: str) -> int:
    """The command as a new process gives it."""
    sys.modules.pop("mymethod", None)
    importlib.invalidate_caches()
    return command(last_of_each([*SETTINGS, *overrides]))


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) + "# so that its size is another\n")


def test_an_edited_file_is_another_run_of_the_command(
    mymethod: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Path("runs/default")
    assert fresh() == 0
    (first,) = folders.iterdir()
    code = load(first / "config.yaml").code
    assert list(code) == ["strategy"] and len(code["strategy"]) == 16
    assert fresh() == 0 and f"already done, skipped: {first}\n" in capsys.readouterr().out
    edited(mymethod, "class Local", "\n# a remark\nclass Local")
    assert fresh() == 0 and "already done, skipped" in capsys.readouterr().out

    edited(mymethod, "factor = 1.0", "factor = 0.9")
    assert fresh() == 0 and "skipped" not in capsys.readouterr().out
    assert len(list(folders.iterdir())) == 2
    edited(mymethod, "factor = 0.9", "factor = 1.0")
    assert fresh() == 0 and f"already done, skipped: {first}\n" in capsys.readouterr().out


def test_an_edited_method_does_not_go_on_with_an_unfinished_run(
    mymethod: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fresh("dir=here", "checkpoint.every=1") == 0
    Path("here/summary.json").unlink()
    edited(mymethod, "factor = 1.0", "factor = 0.9")
    assert fresh("dir=here", "rounds=2") == 2
    said = capsys.readouterr().err
    assert "belongs to another configuration" in said and "; it differs in code.strategy" in said
    assert command(["verify", "here"]) == 2
    assert "FEDSIM_ALLOW=mymethod" in capsys.readouterr().err
    assert command(["verify", "here", "--allow", "mymethod"]) == 1
    assert capsys.readouterr().out.startswith("edited since: the code of strategy, which")
    assert load(Path("here/config.yaml")).rounds == 1


def test_runs_of_built_in_parts_have_no_code_and_import_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.run.resolve.resolve_name", None)  # not called
    config = compose_quickly(["strategy=fedspeed", "engine=serial"])
    before = run_key(config)
    assert resolve(config).code is None and run_key(config) == before
    parts = {"strategy": {"_target_": "torchvision.models.resnet18"}, "model": {"_target_": "no_such.Thing"}}
    assert resolve(OmegaConf.merge(config, parts)).code is None


def test_device_and_vectorising_are_settled_before_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(*overrides: str, place: str = "cpu") -> Any:
        with monkeypatch.context() as here:
            here.setattr("fedsim.run.resolve.device", lambda wish: place if wish == "auto" else wish)
            return resolve(compose_quickly(["engine=serial", f"out={tmp_path}", *overrides]))

    cpu, gpu = config(), config(place="cuda")
    assert (cpu.engine.device, cpu.engine.vectorize) == ("cpu", "off")
    assert (gpu.engine.device, gpu.engine.vectorize) == ("cuda", "auto")
    assert run_key(cpu) == run_key(compose_quickly(["engine=serial"])), "keys of before stay"
    assert len({run_key(c) for c in (cpu, gpu, config("engine.vectorize=on"))}) == 3
    assert run_key(config("engine.device=cpu", "engine.vectorize=off", place="cuda")) == run_key(cpu)

    folder = run_dir(cpu)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"status": "done", "rounds": cpu.rounds}))
    OmegaConf.save(cpu, folder / "config.yaml", resolve=True)
    assert finished(cpu) is not None and finished(gpu) is None and run_dir(gpu) != folder
    recorded = compose_quickly(["engine=serial", f"out={tmp_path}"])  # of before: computed wherever that was
    OmegaConf.save(recorded, folder / "config.yaml", resolve=True)
    monkeypatch.setattr("fedsim.run.key.device", lambda wish: "cuda")
    assert finished(gpu) is not None and run_dir(gpu) == folder and finished(cpu) is None


def test_a_run_records_the_device_it_had() -> None:
    result = classification().run("rounds=1")
    engine = load(result.dir / "config.yaml").engine
    assert (engine.device, engine.vectorize) == ("cpu", "off")


def test_a_skipped_run_of_another_version_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [s for s in SETTINGS if "mymethod" not in s]
    assert command([*settings, "dir=here"]) == 0
    path = Path("here/summary.json")
    summary = json.loads(path.read_text())
    assert summary["fedsim"] == fedsim.__version__
    path.write_text(json.dumps(summary | {"fedsim": "0.0.7"}))
    capsys.readouterr()
    assert command([*settings, "dir=here"]) == 0
    said = f"already done, skipped: here (made by fedsim 0.0.7, this is {fedsim.__version__})\n"
    assert said in capsys.readouterr().out
