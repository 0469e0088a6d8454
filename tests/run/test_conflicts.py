"""Settings that do not go together are told before data are read or workers start, and leave no folder behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from lines import pairs
from problems import classification, network
from torch import nn

import fedsim
from fedsim.api import run
from fedsim.errors import ConfigError, DataError


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading data or starting an engine fails the test."""

    def too_late(*given: Any) -> None:
        raise AssertionError("data were read, or an engine started, before the conflict was told")

    monkeypatch.setattr("fedsim.api.load_data", too_late)
    monkeypatch.setattr("fedsim.api.start_engine", too_late)


@pytest.mark.parametrize(("overrides", "line"), pairs(Path(__file__).with_name("conflicts.txt")))
def test_a_conflict_is_told_first(overrides: str, line: str, no_data: None) -> None:
    with pytest.raises(ConfigError) as caught:
        run(compose_quickly(("engine=serial", *overrides.split())))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert not Path("runs").exists()


# -- what only data and model tell ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("strategy=fedbn", "strategy: FedBN keeps BatchNorm with its clients, but Network has no such layer"),
        (
            "strategy=silobn",
            "strategy: SiloBN keeps BatchNorm with its clients, but Network has no such layer",
        ),
        (
            "buffers=local",
            "buffers=local: without effect; Network has no BatchNorm; leave buffers out",
        ),
        ("buffers=all_local", "buffers=all_local: without effect; Network has no BatchNorm"),
    ],
)
def test_a_policy_for_batchnorm_without_batchnorm_is_said(
    overrides: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem = classification("bn", model=network("bn"))
    with caplog.at_level(logging.WARNING, logger="fedsim.run.needs"):
        problem.run(*overrides.split(), "rounds=1")
        assert not caplog.records
        classification().run(*overrides.split(), "rounds=1")
    assert [r.getMessage().startswith(line) for r in caplog.records] == [True]


def test_methods_with_a_policy_of_their_own_do_without_batchnorm() -> None:
    assert classification().run("strategy=local_only", "buffers=local", "rounds=1").rows


def test_a_run_refused_for_its_data_leaves_what_was_there() -> None:
    Path("runs/default").mkdir(parents=True)
    Path("runs/default/note.txt").touch()
    with pytest.raises(DataError):
        fedsim.simulate(
            ["engine=serial", "data=parquet", "data.path=nowhere.parquet", "dir=runs/default/new/deep"]
        )
    assert [str(p) for p in Path("runs").rglob("*")] == ["runs/default", "runs/default/note.txt"]


def test_a_run_that_failed_in_a_round_keeps_its_folder() -> None:
    class Late(nn.Linear):
        calls = 0

        def forward(self, x: Any) -> Any:
            Late.calls += 1
            if Late.calls > 60:
                raise ConfigError("late")
            return super().forward(x)

    with pytest.raises(Exception, match="late"):
        classification(model=Late(4, 3)).run("dir=kept", "evaluation.every=1", "rounds=20")
    assert Path("kept/metrics.jsonl").read_text()


@pytest.mark.parametrize("place", ["dir=/dev/null/x", "out=/dev/null/x"])
def test_a_folder_that_cannot_be_made(place: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^/dev/null/x.*: cannot be written \(Not a directory\); give another"
    ):
        classification().run(place)
