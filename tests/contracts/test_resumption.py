"""Every strategy, stopped anywhere and resumed, ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from callbacks import Interrupt, Photographer
from hooks import Fail
from problems import classification, hashes
from registry import BROAD, METHODS, Entry, often
from trial import in_ways, record, run_hooked, spread_cohorts, spread_methods, straight

# Methods whose clients keep states, one of each kind, and one whose clients keep none
KEEPING = (
    "fedavg",
    "fedspeed",
    "scaffold",
    "feddyn",
    "moon",
    "ditto",
    "fraug",
    "silobn",
    "fedossl",
    "gossip",
    "fens",
)


@in_ways("every", 3, 1)
def test_killed_after_any_round_and_resumed_the_run_ends_with_the_same_bits(
    entry: Entry, every: int, tmp_path: Path
) -> None:
    problem = classification(entry.model("bn"))
    settings = [*entry.arguments, "rounds=5", f"checkpoint.every={every}", "buffers=local"]
    folder, album = tmp_path / "run", tmp_path / "album"
    expected = problem.run(*settings, f"dir={folder}", callbacks=[Photographer(folder, album)])
    kills = (1, 2, 3, 4) if every == 1 else (2, 4)  # around the one checkpoint, of round 3
    for killed_after in kills:
        resumed = problem.run(*settings, f"dir={album / str(killed_after)}")
        assert hashes(resumed) == hashes(expected)
        assert [r["round"] for r in resumed.rows] == [1, 2, 3, 4, 5]
        for name, value in expected.weights.items():
            assert torch.equal(resumed.weights[name], value)


@spread_methods
def test_interrupted_after_a_round_and_resumed_the_run_ends_with_the_same_bits(
    entry: Entry, tmp_path: Path
) -> None:
    """Nothing was to be checkpointed: what is left at the end of an interrupted run is enough."""
    problem, expected, place = classification(), straight(entry), f"dir={tmp_path}"
    with pytest.raises(KeyboardInterrupt):
        problem.run(*entry.arguments, place, callbacks=[Interrupt(2)])
    resumed = problem.run(*entry.arguments, place)
    assert hashes(resumed) == hashes(expected)
    assert [r["round"] for r in resumed.rows] == [1, 2, 3, 4]


@spread_cohorts
def test_interrupted_within_a_round_that_round_is_done_again_from_the_start(
    entry: Entry, tmp_path: Path
) -> None:
    problem = classification(cohorts=[range(6)] * 4)
    expected = problem.run(*entry.arguments, "engine.chunks=3")
    for at in (
        (0,) if entry.once or entry.frozen else (0, 2) if entry.label in BROAD else (2,)
    ):  # client 4 is in the last chunk: states of the others have been proposed by then
        settings = ["engine.chunks=3", f"dir={tmp_path / str(at)}"]
        fail = Fail([4], KeyboardInterrupt, tmp_path / f"marker{at}", rounds=[at])
        with pytest.raises(KeyboardInterrupt):
            run_hooked(entry, fail, problem, *settings)
        _, resumed = run_hooked(entry, fail, problem, *settings)
        assert hashes(resumed) == hashes(expected)


@pytest.mark.parametrize("entry", often(METHODS, *KEEPING), ids=lambda e: e.label)
def test_client_states_spilled_to_disk_are_the_same_states(entry: Entry, tmp_path: Path) -> None:
    problem = classification()
    expected, roomy = record(entry, problem, "rounds=6")
    spilled, tight = record(entry, problem, "rounds=6", "checkpoint.memory_mb=0")
    assert hashes(tight) == hashes(roomy)
    for one, other in zip(expected.kept[-1], spilled.kept[-1], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
