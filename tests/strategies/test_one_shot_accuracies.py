"""What ``uploads.json`` says of how good each model is: measured once, and no part of what models are told apart by."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from one_shot_settings import METHODS
from problems import classification, network
from safetensors.torch import load_file

from fedsim.rng import torch_rng
from fedsim.run.result import RunResult

NAMES = ("train_accuracy", "own_test_accuracy")


def lines_of(result: RunResult) -> list[dict[str, Any]]:
    index = json.loads((result.dir / "uploads" / "uploads.json").read_text())
    lines: list[dict[str, Any]] = index["clients"]
    return lines


def right(result: RunResult, client: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which samples the client's model gets right, by plain torch."""
    module = network("bn").eval()
    module.load_state_dict(load_file(result.dir / "uploads" / f"{client}.safetensors"), strict=False)
    with torch.no_grad():
        return module(x).argmax(1) == y


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_they_are_of_the_samples_of_the_models_own_client(holdout: float, tmp_path: Any) -> None:
    """Right ones of training samples and own tests together are those of all samples that the client has."""
    problem = classification("bn")
    found = problem.run("strategy=one_shot", "rounds=1", f"evaluation.holdout={holdout}", f"out={tmp_path}")
    for line, (x, y) in zip(lines_of(found), problem.clients, strict=True):
        n, train, own = int(line["samples"]), *(line[name] for name in NAMES)
        rest = len(y) - n
        assert (own is None) == (rest == 0)
        count = float(right(found, line["client"], x, y).sum())
        assert train * n + (own or 0) * rest == pytest.approx(count)
    rows = (found.dir / "clients.jsonl").read_text()
    assert "train/" not in rows and "evaluate/" not in rows


def test_samples_kept_apart_for_an_aggregator_are_none_of_training(tmp_path: Any) -> None:
    problem = classification("bn")
    found = problem.run("strategy=fens", "rounds=1", f"out={tmp_path}")
    for line, (x, y) in zip(lines_of(found), problem.clients, strict=True):
        order = torch.randperm(len(y), generator=torch_rng(0, "proxy", 0, line["client"]))
        rows = order[len(y) - int(line["samples"]) :]
        share = right(found, line["client"], x[rows], y[rows]).double().mean()
        assert line["train_accuracy"] == pytest.approx(float(share))


def test_other_own_tests_are_measured_and_are_the_same_models(tmp_path: Any) -> None:
    words = ("strategy=one_shot", "rounds=1", f"out={tmp_path}")
    one, other = (classification().run(*words, *more) for more in ((), ("evaluation.local_test=true",)))
    assert one.summary["uploads_hash"] == other.summary["uploads_hash"]
    assert [line["own_test_accuracy"] for line in lines_of(one)] == [None] * 6
    assert any(line["own_test_accuracy"] is not None for line in lines_of(other))


def test_a_task_without_accuracy_has_none(tmp_path: Any) -> None:
    entropy = "{_target_: hydra.utils.get_method, path: torch.nn.functional.cross_entropy}"
    words = ("task=own", f"task.loss={entropy}", f"task.metrics={{entropy: {entropy}}}", f"out={tmp_path}")
    found = classification().run("strategy=one_shot", "rounds=1", "evaluation.holdout=0.3", *words)
    assert "entropy" in found.rows[0] and "accuracy" not in found.rows[0]
    assert [tuple(line[name] for name in NAMES) for line in lines_of(found)] == [(None, None)] * 6


def test_a_metric_that_fails_on_a_client_ends_no_run(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    def picky(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if len(y) == 3:
            raise ValueError("too few")
        return (output.argmax(1) == y).double().mean()

    found = classification().run(
        "strategy=one_shot", "rounds=1", f"out={tmp_path}", metrics={"accuracy": picky}
    )
    assert [line["train_accuracy"] is None for line in lines_of(found)] == [c == 2 for c in range(6)]
    assert "the model of client 2 could not be measured" in caplog.text
    assert found.rows[0]["failures"] == []


def test_folders_from_before_they_were_measured_are_taken(tmp_path: Any) -> None:
    first = classification().run("strategy=one_shot", "rounds=1", f"out={tmp_path}/a")
    path = first.dir / "uploads" / "uploads.json"
    index = json.loads(path.read_text())
    for line in index["clients"]:
        for name in NAMES:
            del line[name]
    rest = json.dumps([index["key"], index["outcomes"]], sort_keys=True)
    index["rest_hash"] = hashlib.sha256(rest.encode()).hexdigest()
    path.write_text(json.dumps(index))
    words = ("strategy=dense", *METHODS["dense"], "rounds=1", f"strategy.uploads={first.dir}")
    found = classification().run(*words, f"out={tmp_path}/b")
    assert found.summary["uploads_hash"] == first.summary["uploads_hash"]
    assert not {*NAMES} & {*lines_of(found)[0]}
