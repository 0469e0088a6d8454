"""Replies of finite numbers that would leave nobody else anything to train, or end a run by its budget."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, RecordDict

sys.path.insert(0, str(Path(__file__).parent))
from alterations import Change, values
from real import hashes
from test_adapted import VIT
from test_hostile import HOSTILE, attacked, without

from fedsim.flower import nodes as nodes_module
from fedsim.flower.bounds import check_sizes

BEYOND = r"holds numbers up to .*, which leave nothing of the others' work"
NOWHERE = "nobody could go on from it"
RECORD = ("privacy=record", "privacy.z=1", "privacy.delta=1e-3", "privacy.epsilon_max=8")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    monkeypatch.setenv("FEDSIM_ALLOW", "pairs")


def filled(value: float, *names: str) -> Change:
    """``value`` in the place of all numbers, or of those of some arrays."""

    def change(content: RecordDict) -> None:
        record = content["outcome.update"]
        for key in [k for k in record if not names or k[1:] in names]:
            record[key] = Array(np.full_like(record[key].numpy(), value))

    return change


@pytest.mark.parametrize(
    ("settings", "value", "reason"),
    [
        ((), 9e15, BEYOND),
        ((), -2e3, BEYOND),
        (("model=cnn",), 900.0, NOWHERE),
        (("strategy=fraug", "model=mlp"), 1e4, BEYOND),
        (("strategy=scaffold",), 1e12, BEYOND),
        pytest.param(("strategy=fedit", *VIT), 1e15, BEYOND, marks=pytest.mark.slow),
        pytest.param(("strategy=fedex", *VIT), 1e15, BEYOND, marks=pytest.mark.nightly),
        pytest.param(("strategy=flora", "strategy.ranks=[2, 1]", *VIT), 1e15, BEYOND, marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_what_nobody_could_go_on_from_is_its_clients_failure(
    settings: tuple[str, ...], value: float, reason: str, tmp_path: Path
) -> None:
    run = attacked(tmp_path / "a", [filled(value)] * 2, *settings)
    for row in run.rows:
        (failure,) = row["failures"]
        assert failure["client"] == HOSTILE and re.search(reason, failure["reason"])
    assert hashes(tmp_path / "a/run") == without(tmp_path / "b", *settings, "rounds=2")


def test_one_number_is_enough(tmp_path: Path) -> None:
    def one(content: RecordDict) -> None:
        record = content["outcome.update"]
        key = next(iter(record))
        numbers = record[key].numpy().copy()
        numbers[3] = 1e9
        record[key] = Array(numbers)

    run = attacked(tmp_path, [one])
    assert [f["client"] for f in run.rows[0]["failures"]] == [HOSTILE]


def test_no_variance_is_negative(tmp_path: Path) -> None:
    """It would make what the server measures, and what clients measure, NaN."""
    run = attacked(tmp_path, [filled(-0.5, "buffers")], "model._target_=pairs.Normed")
    (failure,) = run.rows[0]["failures"]
    assert failure["client"] == HOSTILE and "a variance below 0, of norm.running_var" in failure["reason"]


def test_numbers_as_large_as_the_servers_own_are_taken() -> None:
    """Targets in thousands make large steps, of honest clients too."""
    check_sizes({"delta": 9e5}, {"delta": 1e3}, 0.1, lambda name: 10)
    with pytest.raises(Exception, match=r"1e\+06 is the most"):
        check_sizes({"delta": 2e6}, {"delta": 1e3}, 0.1, lambda name: 10)
    check_sizes({"delta": 9e15}, {}, 0.1, lambda name: 10)  # nothing is known


def test_no_more_is_spent_than_its_steps_can_spend(tmp_path: Path) -> None:
    lies: list[Change] = [values(**{"release/events": n}) for n in (1, 2, 1000)]
    run = attacked(tmp_path, lies, *RECORD)
    assert [[f["client"] for f in row["failures"]] for row in run.rows] == [[], [HOSTILE], [HOSTILE]]
    assert "expected a whole number up to 1: 1 a step" in run.rows[1]["failures"][0]["reason"]
    assert run.summary["status"] == "done"
