"""``checkpoint.keep``: checkpoints that outlive newer ones, each with the clients' states of its round."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import classification, hashes
from states import state, value

from fedsim.errors import ConfigError
from fedsim.server import checkpoint
from fedsim.server.clientstore import ClientStore


def rounds(folder: Path) -> list[int]:
    return [checkpoint.rounds_of(path) for path in checkpoint.there(folder)]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("last", [8]), ("all", [1, 2, 3, 4, 5, 6, 7, 8]), ("every:3", [3, 6, 8]), ("every:9", [8])],
)
def test_what_is_to_be_kept_outlives_newer_ones(tmp_path: Path, keep: str, expected: list[int]) -> None:
    clients = ClientStore(tmp_path, 0)
    for done in range(1, 9):
        checkpoint.save(tmp_path, done, {"w": torch.ones(1)}, clients, "key", keep)
    assert rounds(tmp_path) == expected
    assert checkpoint.latest(tmp_path) == tmp_path / "round-000008"


def test_the_latest_before_a_round_is_found(tmp_path: Path) -> None:
    assert checkpoint.before(tmp_path, 5) is None
    for done in (3, 6):
        checkpoint.save(tmp_path, done, {}, ClientStore(tmp_path, 0), "key", "all")
    found = [checkpoint.before(tmp_path, number) for number in (1, 3, 4, 6, 7, 100)]
    assert [path and checkpoint.rounds_of(path) for path in found] == [None, None, 3, 3, 6, 6]


@pytest.mark.parametrize("keep", ["all", "every:4"])
@pytest.mark.parametrize("anew", [False, True], ids=["one process", "a process a checkpoint"])
def test_each_kept_checkpoint_has_the_states_of_its_round(tmp_path: Path, keep: str, anew: bool) -> None:
    """Through many segments, merges, and processes that know only what lies on disk."""
    clients, expected, held = ClientStore(tmp_path, 0), dict[int, dict[int, float]](), dict[int, float]()
    for done in range(1, 41):
        for client in {done % 7, done % 3, 9}:
            held[client] = 100.0 * done + client
            clients.propose(client, done, state(int(held[client]), size=4 + client))
        clients.accept()
        checkpoint.save(tmp_path, done, {"w": torch.tensor(done)}, clients, "key", keep)
        expected[done] = dict(held)
        if anew:
            clients = ClientStore(tmp_path, 0)
            clients.restore(checkpoint.load(tmp_path / f"round-{done:06d}", "key").clients)
    assert len(rounds(tmp_path)) == {"all": 40, "every:4": 10}[keep]
    named = set[str]()
    for path in checkpoint.there(tmp_path):
        found, revived = checkpoint.load(path, "key"), ClientStore(tmp_path, 0)
        revived.restore(found.clients)
        assert {c: value(revived.get(c)) for c in range(10) if revived.get(c)} == expected[found.rounds]
        named |= set(found.clients["sha256"])
    assert {path.name for path in tmp_path.glob("states-*")} == named  # and nothing else takes room


def test_a_process_that_goes_on_from_an_older_one_overwrites_no_states_of_a_newer(tmp_path: Path) -> None:
    clients = ClientStore(tmp_path, 0)
    for done in (1, 2, 3):
        clients.propose(0, done, state(done))
        clients.accept()
        checkpoint.save(tmp_path, done, {}, clients, "key", "all")
    back = ClientStore(tmp_path, 0)
    back.restore(checkpoint.load(tmp_path / "round-000001", "key").clients)
    back.propose(0, 2, state(77))
    back.accept()
    back.flush()
    newest = ClientStore(tmp_path, 0)
    newest.restore(checkpoint.load(tmp_path / "round-000003", "key").clients)
    assert value(newest.get(0)) == 3


@pytest.mark.parametrize("method", ["scaffold", "feddyn", "ditto"])
def test_a_run_goes_on_from_any_kept_checkpoint_with_the_same_bits(tmp_path: Path, method: str) -> None:
    settings = [f"strategy={method}", "rounds=6", "checkpoint.memory_mb=0"]
    whole = classification().run(*settings, f"dir={tmp_path / 'run'}", "checkpoint.keep=every:2", "seed=3")
    kept = checkpoint.there(tmp_path / "run" / "checkpoint")
    assert [checkpoint.rounds_of(path) for path in kept] == [2, 4, 6]
    for path in kept[:2]:
        copy = tmp_path / path.name
        shutil.copytree(tmp_path / "run", copy)
        for other in kept:
            if other != path:
                shutil.rmtree(copy / "checkpoint" / other.name)
        for name in ("summary.json", "weights.safetensors"):
            (copy / name).unlink()
        again = classification().run(*settings, f"dir={copy}", "seed=3")
        assert hashes(again) == hashes(whole)
        assert all(torch.equal(again.weights[k], v) for k, v in whole.weights.items())


def test_what_is_kept_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    place = f"dir={tmp_path}"
    first: Any = classification().run(place, "rounds=2", "checkpoint.keep=all", "checkpoint.every=1")
    longer = classification().run(place, "rounds=3", "checkpoint.keep=every:2")
    assert rounds(tmp_path / "checkpoint") == [2, 3]
    assert hashes(longer)[:2] == hashes(first)


@pytest.mark.parametrize("word", ["some", "every", "every:0", "every:-1", "every:two", "10"])
def test_another_word_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint.keep={word}: choose last, all"):
        classification().run(f"checkpoint.keep={word}")
