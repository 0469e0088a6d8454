"""``fedsim verify`` looks at a run's files too, not at its rows alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from problems import QUIET
from safetensors.torch import load_file, save_file

import fedsim
from fedsim.cli import verify
from fedsim.cli.main import command

SETTINGS = [
    "engine=serial",
    "rounds=2",
    "num_clients=3",
    "clients_per_round=2",
    "data=digits",
    "model.hidden=[4]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recorded") / "run"
    more = ["strategy=scaffold", "evaluation.validation=0.2", f"dir={place}", "tracker=quiet"]
    fedsim.simulate([*QUIET, *SETTINGS, *more])
    return place


def changed_weights(run: Path) -> None:
    state = load_file(run / "weights.safetensors")
    next(iter(state.values())).view(-1)[0] += 1
    save_file(state, run / "weights.safetensors")


def changed_state(run: Path) -> None:
    place = run / "checkpoint" / "round-000002"
    state = load_file(place / "state.safetensors")
    next(t for t in state.values() if t.is_floating_point() and t.numel()).view(-1)[0] += 1
    save_file(state, place / "state.safetensors")
    meta = json.loads((place / "checkpoint.json").read_text())
    meta["sha256"] = hashlib.sha256((place / "state.safetensors").read_bytes()).hexdigest()
    (place / "checkpoint.json").write_text(json.dumps(meta))


def cut(name: str) -> Callable[[Path], None]:
    return lambda run: [p.write_bytes(p.read_bytes()[:100]) for p in run.glob(name)] and None


def other_accuracy(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"accuracy": 0.123}))


def better_accuracy(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["accuracy"] = 0.999
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"accuracy": 0.999}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: None, ""),
        (changed_weights, "weights.safetensors holds other numbers in"),
        (cut("weights.safetensors"), "weights.safetensors is damaged"),
        (cut("weights_best.safetensors"), "weights_best.safetensors is damaged"),
        (lambda run: (run / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (other_accuracy, "summary.json says accuracy=0.123, the rows"),
        (better_accuracy, "metrics.jsonl says accuracy=0.999 after round 2, computed"),
        (cut("summary.json"), "summary.json is damaged"),
        (changed_state, "checkpoint/round-000002 holds other numbers in"),
        (
            cut("checkpoint/*/state.safetensors"),
            "checkpoint/round-000002 is damaged: state.safetensors does not match",
        ),
        (cut("checkpoint/states-*"), "checkpoint/round-000002 is damaged (client states"),
    ],
)
def test_a_file_that_is_not_what_the_rows_say_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: str
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    damage(mine)
    assert command(["verify", str(mine)]) == (1 if said else 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 rounds identical"
    assert [line.startswith(f"{mine}/{said}") for line in lines[1:]] == ([True] if said else [])


def test_the_document_names_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    changed_weights(mine)
    assert command(["verify", str(mine), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(
        document, json.loads((Path(verify.__file__).parent / "verify.schema.json").read_text())
    )
    assert not document["identical"] and document["first_difference"] is None
    assert list(document["files"]) == ["weights.safetensors"]
