"""Client states: against a plain dictionary under any sequence of operations, with next to no memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import state, value

from fedsim.errors import CheckpointError
from fedsim.server.clientstore import ClientStore


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path, 1 << 20)


def test_a_proposal_counts_at_once_and_is_kept_by_accept(store: ClientStore) -> None:
    assert store.get(3) == {}
    store.propose(3, 5, state(1))
    assert value(store.get(3)) == 1
    assert store.last_round(3) == -1
    store.accept()
    assert (value(store.get(3)), store.last_round(3), len(store)) == (1, 5, 1)


def test_a_discarded_proposal_leaves_the_state_before(store: ClientStore) -> None:
    store.propose(3, 0, state(1))
    store.accept()
    store.propose(3, 1, state(2))
    store.propose(4, 1, state(2))
    store.discard()
    store.accept()
    assert value(store.get(3)) == 1
    assert store.get(4) == {}
    assert store.last_round(3) == 0


def test_what_is_proposed_is_copied(store: ClientStore) -> None:
    given_state = state(1)
    store.propose(0, 0, given_state)
    given_state["h"].zero_()
    store.accept()
    assert value(store.get(0)) == 1


def test_memory_stays_within_the_budget_and_states_come_back(tmp_path: Path) -> None:
    budget = 40 * 1000
    store = ClientStore(tmp_path, budget)
    for t in range(5):
        for c in range(20):
            store.propose(c, t, state(100 * t + c, size=1000))  # 4 kB each
        store.accept()
        assert store._bytes <= budget
    assert [value(store.get(c)) for c in range(20)] == [400 + c for c in range(20)]


def test_segments_that_no_checkpoint_needs_are_pruned(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, 0)
    for t in range(30):
        for c in (t % 3, 7):
            store.propose(c, t, state(t))
        store.accept()
    index = store.flush()
    (tmp_path / ".states-000099.safetensors.tmp").write_text("left over by a kill")
    store.prune()
    live = {segment for segment, _ in index["clients"].values()}
    assert {p.name for p in tmp_path.iterdir()} == live
    assert len(live) <= 9
    assert [value(store.get(c)) for c in (0, 1, 2, 7)] == [27, 28, 29, 29]


def test_an_older_index_still_works_until_the_next_prune(tmp_path: Path) -> None:
    """A kill between two checkpoints: what was spilled since must not have replaced what the old one names."""
    store = ClientStore(tmp_path, 0)
    store.propose(1, 0, state(10))
    store.accept()
    index = store.flush()
    store.prune()
    for t in range(1, 12):
        store.propose(1, t, state(10 + t))
        store.propose(2, t, state(t))
        store.accept()
    revived = ClientStore(tmp_path, 0)
    revived.restore(index)
    assert (value(revived.get(1)), revived.last_round(1), revived.get(2)) == (10, 0, {})
    revived.propose(1, 1, state(50))
    revived.accept()
    assert value(revived.get(1)) == 50


def test_a_missing_or_shortened_segment_is_refused_by_name(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, 0)
    store.propose(1, 0, state(10))
    store.accept()
    index = store.flush()
    segment = tmp_path / index["clients"]["1"][0]
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-3])
    revived = ClientStore(tmp_path, 0)
    with pytest.raises(CheckpointError, match=segment.name):
        revived.restore(index)
        revived.get(1)
    segment.unlink()
    with pytest.raises(CheckpointError, match=rf"{segment.name} is missing; resume=never"):
        ClientStore(tmp_path, 0).restore(index)


def test_a_changed_byte_in_a_segment_is_refused_by_name(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, 0)
    store.propose(1, 0, state(10))
    store.accept()
    index = store.flush()
    segment = tmp_path / index["clients"]["1"][0]
    raw = bytearray(segment.read_bytes())
    raw[-1] ^= 1
    segment.write_bytes(raw)
    with pytest.raises(CheckpointError, match=segment.name):
        ClientStore(tmp_path, 0).restore(index)


def test_without_a_folder_everything_stays_in_memory() -> None:
    store = ClientStore(None, 0)
    for c in range(5):
        store.propose(c, 0, state(c))
    store.accept()
    assert [value(store.get(c)) for c in range(5)] == [0, 1, 2, 3, 4]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("propose"), st.integers(0, 5), st.integers(0, 10**6)),
        st.tuples(st.sampled_from(["accept", "discard", "checkpoint", "crash"])),
        st.tuples(st.just("get"), st.integers(0, 5)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(operations, st.sampled_from([0, 150, 400, 10**6]))
def test_any_sequence_of_operations_agrees_with_a_dictionary(sequence: list[Any], budget: int) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        store = ClientStore(folder, budget)
        accepted: dict[int, int] = {}
        pending: dict[int, int] = {}
        saved: dict[int, int] = {}
        index = store.flush()
        for t, (name, *arguments) in enumerate(sequence):
            if name == "propose":
                client, number = arguments
                store.propose(client, t, state(number))
                pending[client] = number
            elif name == "accept":
                store.accept()
                accepted, pending = accepted | pending, {}
            elif name == "discard":
                store.discard()
                pending = {}
            elif name == "checkpoint":
                store.discard()  # as the loop does: never between a proposal and its acceptance
                pending, saved = {}, dict(accepted)
                index = store.flush()
                store.prune()
            elif name == "crash":
                store = ClientStore(folder, budget)
                store.restore(index)
                accepted, pending = dict(saved), {}
            for client in arguments[:1] if name == "get" else range(6):
                assert value(store.get(client)) == (accepted | pending).get(client)
            assert len(store) == len(accepted)
    finally:
        shutil.rmtree(folder)
