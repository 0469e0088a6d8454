"""Legs of secure aggregation that were altered on the way: nobody else fails by them, and no sum is another."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Error, Message, RecordDict

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import asked, deploy
from real import events, hashes
from test_hostile import HOSTILE, TINY, of_the_hostile

from fedsim.flower import nodes as nodes_module

MASKED = ("rounds=1", "secagg=masks", "secagg.reach=1")
SEVEN = ("num_clients=7", "clients_per_round=7")  # of whom five are enough
Rows = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)


def altered(task: str, make: Rows) -> Any:
    """``make`` of what the hostile client sends in a leg."""

    def alter(message: Message, content: RecordDict) -> None:
        if of_the_hostile(message, task):
            record = content["outcome.update"]
            key = next(iter(record))
            record[key] = Array(make(record[key].numpy()))

    return alter


def gone(task: str) -> Any:
    return lambda message: Error(2, "gone") if of_the_hostile(message, task) else None


@pytest.mark.parametrize(
    "make",
    [
        lambda keys: keys * 0,
        lambda keys: np.concatenate([keys[:, :32], keys[:, 32:] * 0], axis=1),
        lambda keys: np.concatenate([keys[:, :32] * 0 + np.eye(1, 32, dtype=np.uint8), keys[:, 32:]], axis=1),
    ],
    ids=["zeros", "half", "one"],
)
def test_keys_that_nobody_can_agree_by_are_not_handed_out(make: Rows, tmp_path: Path) -> None:
    run, _ = deploy(tmp_path / "a", *TINY, *MASKED, alter=altered("secagg/keys", make))
    assert [f["client"] for f in run.rows[0]["failures"]] == [HOSTILE]
    told = [e for e in events(tmp_path / "a/run") if e["event"] == "absent"]
    assert [e["client"] for e in told] == [HOSTILE] and "its keys are none" in told[0]["reason"]
    deploy(tmp_path / "b", *TINY, *MASKED, spoil=gone("secagg/keys"))
    assert hashes(tmp_path / "a/run") == hashes(tmp_path / "b/run")


def test_two_clients_with_the_same_keys_leave_the_others_in_peace(tmp_path: Path) -> None:
    """Honest clients refuse keys that two have; so nobody is handed them."""

    def alter(message: Message, content: RecordDict) -> None:
        if asked(message) and message.content["broadcast"]["task"] == "secagg/keys":
            client = message.content["ask"]["client"]
            content["outcome.update"]["=keys"] = Array(
                np.full((1, 64), 9, np.uint8)
                if client in (1, 2)
                else content["outcome.update"]["=keys"].numpy()
            )

    run, _ = deploy(tmp_path, *TINY, *MASKED, *SEVEN, clients=7, alter=alter)
    reasons = {f["client"]: f["reason"] for f in run.rows[0]["failures"]}
    assert sorted(reasons) == [1, 2] and all(
        "another client has the same keys" in r for r in reasons.values()
    )


@pytest.mark.parametrize("wrong", ["noise", "zeros", "other index"])
def test_a_wrong_share_spoils_no_secret(wrong: str, tmp_path: Path) -> None:
    """Two of three shares give a secret back, whichever."""

    def make(shares: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(0).integers(1, 256, shares.shape, np.uint8)
        return {"noise": noise, "zeros": shares * 0, "other index": shares + np.eye(1, 52, dtype=np.uint8)}[
            wrong
        ]

    run, _ = deploy(tmp_path / "a", *TINY, *MASKED, alter=altered("secagg/unmask", make))
    assert run.rows[0]["failures"] == []
    deploy(tmp_path / "b", *TINY, *MASKED)
    assert hashes(tmp_path / "a/run") == hashes(tmp_path / "b/run")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_a_release_counts_is_a_number(value: float, tmp_path: Path) -> None:
    def alter(message: Message, content: RecordDict) -> None:
        if of_the_hostile(message, "fit"):
            content["metrics"]["release/saturated"] = value

    run, _ = deploy(tmp_path, *TINY, "rounds=1", "secagg=ring", "secagg.reach=1", alter=alter)
    assert [f["client"] for f in run.rows[0]["failures"]] == [HOSTILE]
    assert re.search(
        r"metric 'release/saturated' is .*, expected a number", run.rows[0]["failures"][0]["reason"]
    )


def test_a_sum_that_shows_to_be_spoilt_makes_the_round_void(tmp_path: Path) -> None:
    """Masked otherwise than its shares say: it shows where fewer came than the ring was made for."""

    def lost(message: Message) -> Error | None:
        work = asked(message) == (1, 5) and message.content["broadcast"]["task"] == "fit"
        return Error(2, "gone") if work else None

    def noise(frame: np.ndarray) -> np.ndarray:
        changed = np.random.default_rng(0).integers(0, 256, len(frame), np.uint8)
        return np.concatenate([frame[:-2400], changed[-2400:]])

    for folder, alter in (("honest", None), ("spoilt", altered("fit", noise))):
        more = {} if alter is None else {"alter": alter}
        run, _ = deploy(tmp_path / folder, *TINY, *MASKED, *SEVEN, clients=7, spoil=lost, **more)
        reasons = {f["client"]: f["reason"] for f in run.rows[0]["failures"]}
        assert sorted(reasons) == ([5] if alter is None else list(range(7)))
    assert "the sum of 'delta' is none that 6 clients can have" in reasons[0]
