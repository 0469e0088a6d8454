"""``fedsim diff``: it names where two runs part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from problems import Problem, classes, classification

import fedsim.cli.diff as cli_diff
from fedsim.cli.main import command
from fedsim.config.words import last_of_each
from fedsim.replay.parting import diff
from fedsim.tracking.rows import read_rows

DIGITS = (
    "engine=serial", "tracker=quiet", "num_clients=6", "clients_per_round=3", "rounds=3", "client.epochs=1",
    "model.hidden=[8]", "checkpoint.every=1", "checkpoint.keep=all",
)  # fmt: skip


def digits(folder: Path, *overrides: str) -> str:
    assert command(last_of_each([*DIGITS, f"dir={folder}", *overrides])) == 0
    return str(folder)


def handed(problem: Problem) -> dict[str, Any]:
    return {k: getattr(problem, k) for k in ("model", "clients", "test")}


def compared(one: Problem, other: Problem, place: Path, *overrides: str) -> dict[str, Any]:
    a, b = (p.run(*overrides, f"dir={place / name}").dir for name, p in (("a", one), ("b", other)))
    return diff(a, b, handed=(handed(one), handed(other)))


def test_one_bit_in_one_clients_data_names_round_client_and_tensor(tmp_path: Path) -> None:
    changed = classes()
    x = changed[3][0].clone()
    bits = x.view(torch.int32)
    bits[0, 0] ^= 1 << 12  # of 23 of the fraction: what is lower may be lost in the first rounding
    changed[3] = (x, changed[3][1])
    found = compared(classification(), classification(clients=changed), tmp_path, "client.shuffle=false")
    first = next(r["round"] for r in read_rows(tmp_path / "a" / "metrics.jsonl") if 3 in r["cohort"])
    assert found["code"] == 1 and found["weights"]["first"] == first
    assert found["data"] is False and found["partition"]["same"] and found["start"]
    inside = found["inside"]
    assert (inside["client"], inside["kind"], inside["vector"]) == (3, "update", "delta")
    assert inside["tensor"] == "0.weight" and 1 <= inside["entries"][0] <= inside["entries"][1] == 20
    assert 0 < inside["largest"] < 1e-2 and inside["ulps"] >= 1


def test_shards_that_changed_hands_are_found_in_the_partition_first(tmp_path: Path) -> None:
    swapped = classes()
    swapped[1], swapped[4] = swapped[4], swapped[1]
    found = compared(classification(), classification(clients=swapped), tmp_path)
    assert found["partition"] == {"same": False, "client": 1}


def test_where_all_updates_agree_it_was_the_server(tmp_path: Path) -> None:
    settings = ("strategy=fedavgm", "rounds=1"), ("strategy=fedavgm", "rounds=1", "strategy.server_lr=0.5")
    problem = classification()
    a, b = (problem.run(*s, f"dir={tmp_path / str(i)}").dir for i, s in enumerate(settings))
    found = diff(a, b, handed=(handed(problem), handed(problem)))
    assert found["settings"] == {"strategy.server_lr": [1.0, 0.5]}
    assert found["inside"] == {"round": 1, "kind": "server"} and found["code"] == 1


def test_answers_that_are_lost_or_not_finite_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = ("system=lognormal", "rounds=2")
    a = digits(tmp_path / "a", *fleet)
    lost = digits(tmp_path / "lost", *fleet, "system.dropout.after=0.9")
    spoilt = digits(
        tmp_path / "spoilt", *fleet, "attack=nonfinite", "attack.fraction=0.9", "attack.value=inf",
        "failures.nonfinite=skip",
    )  # fmt: skip
    inside = diff(a, lost)["inside"]
    gone = {f["client"] for f in read_rows(tmp_path / "lost" / "metrics.jsonl")[0]["failures"]}
    assert inside == {
        "round": 1, "kind": "failure", "client": min(gone), "failure": "dropped", "only_in": "B",
    }  # fmt: skip
    capsys.readouterr()
    assert command(["diff", a, spoilt, "--json"]) == 1
    found = json.loads(
        capsys.readouterr().out, parse_constant=pytest.fail
    )  # stdout holds JSON, and nothing else
    schema = json.loads(Path(cli_diff.__file__).with_name("diff.schema.json").read_text())
    jsonschema.validate(found, schema)
    assert found["inside"]["nonfinite"] == found["inside"]["entries"][0] and "largest" not in found["inside"]


def test_what_a_release_makes_of_equal_updates_is_looked_at(tmp_path: Path) -> None:
    a, b = (
        digits(tmp_path / f"k{k}", "rounds=1", "compression=top_k", f"compression.rate={k}")
        for k in (0.1, 0.2)
    )
    inside = diff(a, b)["inside"]
    client = min(read_rows(tmp_path / "k0.1" / "metrics.jsonl")[0]["cohort"])
    assert (inside["kind"], inside["client"], inside["vector"]) == ("sent", client, "delta")


def test_models_that_are_unlike_cannot_be_compared(tmp_path: Path) -> None:
    one, other = classification("tanh"), classification("bn")
    a, b = (p.run("rounds=1", f"dir={tmp_path / n}").dir for n, p in (("a", one), ("b", other)))
    found = diff(a, b)
    assert found["code"] == 2 and "1.weight" in found["layout"]


def test_what_was_handed_over_is_compared_as_far_as_it_is_recorded(tmp_path: Path) -> None:
    problem = classification()
    a = problem.run("client.lr=0.1", f"dir={tmp_path / 'a'}").dir
    b = problem.run("client.lr=0.2", f"dir={tmp_path / 'b'}").dir
    found = diff(a, b)
    assert found["code"] == 2 and found["weights"]["first"] == 1 and "handed over in Python" in found["error"]
    assert diff(a, b, metrics_only=True)["code"] == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, longer = digits(tmp_path / "base"), digits(tmp_path / "longer", "rounds=4", "evaluation.every=2")
    other = digits(tmp_path / "other", "client.batch_size=25", "tracker.update_hashes=true")
    capsys.readouterr()
    assert command(["diff", base, base]) == 0
    assert "the same in all 3 common rounds" in capsys.readouterr().out
    assert command(["diff", base, longer]) == 0
    assert "A is a prefix of B" in capsys.readouterr().out
    assert command(["diff", base, other]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "settings   client.batch_size 50 against 25"
    assert lines[1] == "same       data, partition, start, cohorts, weights up to round 0"
    client = min(read_rows(tmp_path / "base" / "metrics.jsonl")[0]["cohort"])
    assert lines[2].startswith(f"round 1    first difference: update of client {client}, delta, ")
    assert command(["diff", base, other, "--json"]) == 1
    schema = json.loads(Path(cli_diff.__file__).with_name("diff.schema.json").read_text())
    jsonschema.validate(found := json.loads(capsys.readouterr().out), schema)
    assert found["inside"]["client"] == client
    assert command(["diff", base, other, "--json", "--metrics-only"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == {"rounds": 3, "first": 1, "prefix": None} and "inside" not in found
    assert command(["diff", base, str(tmp_path / "nowhere")]) == 2
    hashes = read_rows(tmp_path / "other" / "hashes.jsonl")
    assert [(r["round"], r["exchange"], r["client"]) for r in hashes] == [
        (row["round"], 0, c) for row in read_rows(tmp_path / "other" / "metrics.jsonl") for c in row["cohort"]
    ]
    assert {"message/w", "update/delta"} <= hashes[0].keys()


def test_a_later_difference_is_found_from_the_checkpoint_before_it(tmp_path: Path) -> None:
    """One run is what the other is until a client of the second round is left out of it."""
    base = digits(tmp_path / "base", "strategy=scaffold")
    rows = read_rows(tmp_path / "base" / "metrics.jsonl")
    other = digits(
        tmp_path / "other", "strategy=scaffold", "client.round_schedule={shape: step, at: [2], gamma: 0.5}"
    )
    found = diff(base, other)
    assert found["code"] == 1 and found["weights"]["first"] == 3
    assert found["inside"]["client"] == min(rows[2]["cohort"]) and found["inside"]["kind"] == "update"


def classed(epochs: int) -> str:
    """Half of the clients train a linear model instead, for so many epochs."""
    return f"client.classes=[{{share: 1}}, {{share: 1, model: linear, epochs: {epochs}}}]"


@pytest.mark.parametrize(
    ("first", "second", "kind", "tensor"),
    [
        ("client.lr=0.05", "client.lr=0.02", "MLP", "layers.0.weight"),
        (classed(1), classed(2), "Linear", "head.weight"),
    ],
)
def test_models_that_were_handed_over_once_are_asked_for_again(
    first: str, second: str, kind: str, tensor: str, tmp_path: Path
) -> None:
    """All runs left theirs where others find them; they part at clients, of one architecture, or at the server."""
    words = ("strategy=feddf", "strategy.data=noise", "strategy.noise_samples=8", f"out={tmp_path / 'out'}")
    a, b, c = (
        Path(digits(tmp_path / name, *words, own, f"strategy.steps={steps}"))
        for name, own, steps in (("a", first, 6), ("b", second, 6), ("c", first, 9))
    )
    lines = json.loads((a / "uploads" / "uploads.json").read_text())["clients"]
    inside = diff(a, b)["inside"]
    assert inside["client"] == next(line["client"] for line in lines if line["architecture"] == kind)
    assert (inside["round"], inside["kind"], inside["vector"], inside["tensor"]) == (
        1,
        "update",
        "delta",
        tensor,
    )
    assert diff(a, c)["inside"] == {"round": 1, "kind": "server"}


def test_a_record_that_cannot_be_reproduced_is_said_to_be_one(tmp_path: Path) -> None:
    base, other = digits(tmp_path / "base"), digits(tmp_path / "other", "client.lr=0.01")
    log = tmp_path / "base" / "metrics.jsonl"
    rows = read_rows(log)
    rows[0]["weights_hash"] = "0" * 64
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = diff(base, other)
    assert found["code"] == 2 and "cannot be reproduced here" in found["error"] and found["settings"]
