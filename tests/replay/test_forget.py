"""``fedsim forget``: the weights are a function of the other clients' samples, from wherever it starts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from callbacks import Interrupt

import fedsim
from fedsim import api
from fedsim.cli.main import command
from fedsim.replay.again import begin_at, rounds_there
from fedsim.replay.unlearning import forget, plan
from fedsim.replay.variants import BaseRun
from fedsim.tracking.rows import read_rows

SETTINGS = (
    "engine=serial", "tracker=quiet", "data=owned", "partition=natural",
    "num_clients=6", "clients_per_round=2", "rounds=6", "client.epochs=1", "client.batch_size=4", "model=mlp",
    "model.hidden=[5]", "checkpoint.every=1", "checkpoint.keep=all", "engine.chunks=2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("FEDSIM_ALLOW", "owned")  # the commands build it from run folders


def settings(folder: Path, *more: str) -> list[str]:
    """With the data source of ``owned.py`` as an option."""
    conf = folder.parent / "conf" / "data"
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "owned.yaml").write_text("_target_: owned.source\nchanged: null\nrows: null\n")
    return [f"hydra.searchpath=[file://{conf.parent}]", *SETTINGS, f"dir={folder}", *more]


def base(folder: Path, *more: str) -> Path:
    return fedsim.simulate(settings(folder, *more)).dir


def late(folder: Path) -> int:
    """The client that is met last."""
    run = BaseRun.of(folder)
    return max(run.clients, key=lambda c: run.first_met([c]) or 0)


def facts(folder: Path) -> list[Any]:
    return [
        (r["round"], r["cohort"], r["weights_hash"], r.get("accuracy"))
        for r in read_rows(folder / "metrics.jsonl")
    ]


ACTIVE, ALONE = "strategy.dual_mean=active", "strategy.start=random"
GOES_ON = [("fedavg",), ("ditto",), ("feddyn", ACTIVE), ("term",), ("ifca", ALONE, "strategy.k=2")]
BEGINS_ANEW = [("scaffold",), ("feddyn",)]


def test_positions_beyond_the_last_sample_are_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = base(tmp_path / "a" / "run", "rounds=1", "evaluation.holdout=0.3")
    there = sorted(run.parent.iterdir())
    for words in (["--samples", "1:3,12", "--dry-run"], ["--samples", "1:12"]):
        assert command(["forget", str(run), *words]) == 2
        assert "client 1 has 12 samples, at positions from 0 to 11" in capsys.readouterr().err
    assert command(["forget", str(run), "--samples", "1:11", "--dry-run"]) == 0  # one of its tests, maybe
    assert sorted(run.parent.iterdir()) == there


@pytest.mark.parametrize("method", GOES_ON + BEGINS_ANEW, ids=" ".join)
def test_it_equals_the_run_without_them_whatever_their_samples_were(
    method: tuple[str, ...], tmp_path: Path
) -> None:
    own = (f"strategy={method[0]}", *method[1:])
    run = base(tmp_path / "a" / "run", *own)
    client = late(run)
    todo = plan(run, [client])
    assert (todo.why_all == "") == (method in GOES_ON)
    done = forget(todo)
    assert done["start"] == (todo.first_met - 1 if not todo.why_all else 0) and todo.first_met > 1
    other = f"data.changed={client}"
    zero = fedsim.simulate(settings(tmp_path / "zero", *own, f"exclude=[{client}]", other))
    assert facts(todo.folder) == facts(zero.dir)
    changed = base(tmp_path / "b" / "run", *own, other)
    again = plan(changed, [client])
    assert forget(again)["hashes"]["after"] == done["hashes"]["after"]
    assert facts(changed) != facts(run) and facts(again.folder) == facts(todo.folder)
    assert json.loads((todo.folder / "forget.json").read_text())["clients"] == [client]


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "feddyn", "afl"])
def test_a_sample_is_forgotten_likewise(strategy: str, tmp_path: Path) -> None:
    """From a checkpoint also where a method computes with the number of clients: that stays what it was."""
    own = f"strategy={strategy}"
    run = base(tmp_path / "a" / "run", own)
    client = late(run)
    changed = base(tmp_path / "b" / "run", own, f"data.changed={client}", "data.rows=[1]")
    results = [forget(plan(folder, [], {client: [1]})) for folder in (run, changed)]
    assert results[0]["hashes"]["after"] == results[1]["hashes"]["after"] != results[0]["hashes"]["before"]
    assert results[0]["start"] > 0 and results[0]["hashes"]["before"] != results[1]["hashes"]["before"]
    left = f"exclude_samples={{{client}: [1]}}"
    zero = fedsim.simulate(settings(tmp_path / "zero", own, left, f"data.changed={client}", "data.rows=[1]"))
    assert facts(Path(results[0]["without"])) == facts(zero.dir)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("strategy=centralised", "all clients' samples lie in one place"),
        ("strategy=scaffold", "Scaffold computes with the number of all clients"),
        ("strategy=fesem", "FeSEM asks all clients before its first round"),
        ("evaluation.validation=0.2", "among those set apart beforehand"),
        ("audit.canaries=4 audit.guesses=2", "dealt to, those who are there"),
        ("attack=backdoor attack.fraction=0.4", "the largest of all samples"),
    ],
)
def test_why_a_run_begins_anew(setting: str, said: str, tmp_path: Path, capsys: Any) -> None:
    run = base(tmp_path / "run", *setting.split(), "rounds=1", "clients_per_round=6")
    assert command(["forget", str(run), "--client", "1", "--dry-run"]) == 0
    assert said in capsys.readouterr().out
    assert command(["forget", str(run), "--client", "1"]) == 0
    assert said in capsys.readouterr().out.splitlines()[0]


def test_the_command_is_resumable_and_purges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = base(tmp_path / "run")
    client = late(run)
    assert command(["forget", str(run), "--client", str(client), "--dry-run", "--json"]) == 0
    todo = json.loads(capsys.readouterr().out)
    assert not Path(todo["without"]).exists() and todo["from_zero"] is None
    everybody = ",".join(map(str, range(plan(run, [client]).config.num_clients)))
    for words, said in (
        (["--client", everybody], "nobody would be left to train"),
        (["--samples", f"{client}:-1"], f"sample {client}:-1: positions go from 0"),
        (["--samples", "0,1:2"], "one client and positions"),
    ):
        assert command(["forget", str(run), *words, "--dry-run"]) == 2
        assert said in capsys.readouterr().err
    kept = (run / "clients.jsonl").rename(run / "elsewhere")
    assert command(["forget", str(run), "--client", str(client), "--dry-run"]) == 2
    assert "clients.jsonl: is not there" in capsys.readouterr().err
    kept.rename(run / "clients.jsonl")
    assert command(["forget", str(run), "--client", str(client)]) == 0
    assert "forgotten: " in capsys.readouterr().out
    assert command(["forget", str(run), "--client", str(client), "--purge", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["cost"]["rounds"] < 6 and done["purged"] == [str(run)]
    assert not run.exists() and (Path(done["without"]) / "weights.safetensors").exists()
    assert command(["forget", done["without"], "--client", str(client)]) == 2
    assert "excluded from this run already" in capsys.readouterr().err
    assert command(["forget", done["without"], "--client", "x"]) == 2
    assert command(["forget", done["without"]]) == 2


def test_killed_on_its_way_it_goes_on(tmp_path: Path) -> None:
    run = base(tmp_path / "a" / "run", "strategy=ditto")
    todo = plan(run, [late(run)])
    assert begin_at(run, todo.first_met or 0, todo.config, todo.folder, mark="")
    at = rounds_there(todo.folder) + 1
    with pytest.raises(KeyboardInterrupt):
        api.run(copy.deepcopy(todo.config), callbacks=[Interrupt(at)])
    forget(todo)
    whole = plan(base(tmp_path / "b" / "run", "strategy=ditto"), list(todo.clients))
    forget(whole)
    assert facts(todo.folder) == facts(whole.folder)


def test_nodes_own_data_cannot_be_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = base(tmp_path / "run", "rounds=1")
    (run / "deployment.json").write_text('{"own_data": true}')
    for words in (["forget", str(run), "--client", "1"], ["value", str(run)]):
        assert command(words) == 2
        assert "the nodes brought their own data" in capsys.readouterr().err
