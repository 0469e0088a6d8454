"""One folder is one run's: finished, refused, failed or interrupted, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hooks import Fail, hooked
from problems import classes, classification, hashes, method, network
from torch import nn

import fedsim
from fedsim.errors import CheckpointError
from fedsim.server.clientstore import ClientStore
from fedsim.server.exchanges import Server


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    rounds: list[int] = []
    listener = SimpleNamespace(round=lambda row, clients: rounds.append(row["round"]))
    first = classification().run(f"dir={tmp_path}")
    again = classification().run(f"dir={tmp_path}", callbacks=[listener])
    assert rounds == []
    assert hashes(again) == hashes(first)
    assert all(torch.equal(again.weights[k], v) for k, v in first.weights.items())
    third = classification().run(f"dir={tmp_path}", "resume=never", callbacks=[listener])
    assert rounds == [1, 2, 3, 4]
    assert hashes(third) == hashes(first)


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": ["client.lr=0.2"]},
        {"initial": {k: v + 1 for k, v in network().state_dict().items()}},
        {"clients": classes(seed=5)},
        {"test": classes((11,), seed=6)[0]},
        {"cohorts": [[0], [1], [2], [3]]},
        {"loss": nn.functional.multi_margin_loss},
        {"strategy": method("fedavg", "strategy.server_lr=0.5")},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_folder_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    classification().run(f"dir={tmp_path}", strategy=method("fedavg"))
    overrides = changes.pop("overrides", [])
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        classification().run(f"dir={tmp_path}", *overrides, **{"strategy": method("fedavg"), **changes})


def test_a_failed_run_says_so_and_keeps_its_rows(tmp_path: Path) -> None:
    problem = classification(cohorts=[range(6)] * 4)
    with pytest.raises(fedsim.errors.ClientError):
        problem.run(f"dir={tmp_path}", strategy=hooked("fedavg", Fail([4], rounds=[2])))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("failed", 2)
    assert "client 4 failed in round 3" in summary["error"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "checkpoint" / "round-000002").is_dir()


def interrupted_and_resumed(
    settings: list[str], owner: type, name: str, call: int, patch: pytest.MonkeyPatch, *, before: bool
) -> fedsim.RunResult:
    """A run in which ``owner.name`` meets Ctrl-C at its ``call``-th call, before or after its work; then resumed."""
    plain, calls = getattr(owner, name), []

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(1)
        if before and len(calls) == call:
            raise KeyboardInterrupt
        out = plain(self, *args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return out

    with patch.context() as during:
        during.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            classification().run(*settings)
    return classification().run(*settings)


def test_an_interrupt_while_measuring_loses_the_round_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights without a row, or a row without weights, would be worse."""
    settings = ["strategy=fedspeed", "evaluation.every=1"]
    expected = classification().run(*settings)
    place = [*settings, f"dir={tmp_path / 'run'}"]
    resumed = interrupted_and_resumed(place, Server, "evaluate", 3, monkeypatch, before=True)
    assert [r["round"] for r in resumed.rows] == [1, 2, 3, 4]
    assert hashes(resumed) == hashes(expected)


def test_an_interrupt_while_states_are_accepted_falls_back_to_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["strategy=fedspeed", "rounds=5"]
    expected = classification().run(*settings)
    place = [*settings, "checkpoint.every=2", f"dir={tmp_path / 'run'}"]
    resumed = interrupted_and_resumed(place, ClientStore, "accept", 4, monkeypatch, before=False)
    assert hashes(resumed) == hashes(expected)
    assert [r["round"] for r in resumed.rows] == [1, 2, 3, 4, 5]
