"""Replies that Flower itself stumbles over: too many bytes, too late, or nothing that a message can be made of."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import asked, deploy
from real import events, hashes
from test_hostile import HOSTILE, TINY, without

from fedsim.errors import EngineError
from fedsim.flower import nodes as nodes_module
from fedsim.flower import taking
from fedsim.flower.taking import Taking, unread

Forging = Callable[[dict[str, bytes]], None]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)


def thing(kind: str, body: bytes, *children: str) -> bytes:
    """As Flower writes an object."""
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body


def instead(*objects: bytes) -> Forging:
    """These, of which the last is the whole."""

    def forge(there: dict[str, bytes]) -> None:
        there.clear()
        there.update({get_object_id(content): content for content in objects})

    return forge


def chain(there: dict[str, bytes]) -> None:
    """Records within records, deeper than anybody can follow."""
    below = thing("RecordDict", b"{}")
    there.clear()
    for _ in range(3000):
        there[get_object_id(below)] = below
        below = thing("RecordDict", b"{}", get_object_id(below))
    there[get_object_id(below)] = below


FORGED: dict[str, tuple[Forging, str]] = {
    "no object": (instead(b"gibberish"), "ValueError"),
    "unknown": (instead(thing("Splendid", b"")), "KeyError"),
    "a piece": (instead(thing("ArrayChunk", b"abc")), "its reply is not taken"),
    "no json": (instead(thing("RecordDict", b"{")), "Error"),
    "child missing": (instead(thing("RecordDict", b'{"outcome": "0"}', "0" * 64)), "KeyError"),
    "chain": (chain, "RecursionError"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_what_cannot_be_read_is_its_senders_failure_and_nobody_elses(kind: str, tmp_path: Path) -> None:
    """All replies of a round are pulled by one call."""
    forge, reason = FORGED[kind]

    def mine(message: Message, there: dict[str, bytes]) -> None:
        if asked(message) == (1, HOSTILE):
            forge(there)

    run, grid = deploy(tmp_path / "a", *TINY, "rounds=1", forge=mine)
    assert [f["client"] for f in run.rows[0]["failures"]] == [HOSTILE]
    assert reason in run.rows[0]["failures"][0]["reason"]
    assert hashes(tmp_path / "a/run") == without(tmp_path / "b", "rounds=1")
    assert sum(message == "train" for _, message, _ in grid.log) == 3, "nobody is asked twice"
    assert [e["client"] for e in events(tmp_path / "a/run") if e["event"] == "not_taken"] == [HOSTILE]


@pytest.mark.parametrize("kind", FORGED)
def test_an_introduction_that_cannot_be_read_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    def mine(message: Message, there: dict[str, bytes]) -> None:
        if asked(message) is None and message.metadata.dst_node_id == 101:
            FORGED[kind][0](there)

    with pytest.raises(EngineError, match="missing: 1\nnode 101 is refused: its introduction is none: "):
        deploy(tmp_path, *TINY, "rounds=1", "failures.policy=stop", forge=mine)


def test_a_node_that_breaks_off_in_its_reply_is_asked_again_and_no_bit_changes(tmp_path: Path) -> None:
    """Its pieces did not come: Flower says so by an error that names the server itself as its sender."""
    broken = list[tuple[int, int]]()

    def forge(message: Message, there: dict[str, bytes]) -> None:
        if (place := asked(message)) == (1, HOSTILE) and place not in broken:
            broken.append(place)
            raise ObjectPullError("piece", "timeout or retry limit reached")

    run, _ = deploy(tmp_path / "a", *TINY, "rounds=2", "failures.policy=stop", forge=forge)
    deploy(tmp_path / "b", *TINY, "rounds=2")
    assert broken and [row["failures"] for row in run.rows] == [[], []]
    assert hashes(tmp_path / "a/run") == hashes(tmp_path / "b/run")
    assert [e["client"] for e in events(tmp_path / "a/run") if e["event"] == "lost"] == [HOSTILE]


def test_another_record_than_expected_is_no_introduction(tmp_path: Path) -> None:
    def alter(message: Any, content: RecordDict) -> RecordDict | None:
        hello = asked(message) is None and message.metadata.dst_node_id == 101
        return RecordDict({"node": ConfigRecord({"refused": [1] * 9})}) if hello else None

    with pytest.raises(EngineError, match="node 101 is refused"):
        deploy(tmp_path, *TINY, "rounds=1", "failures.policy=stop", alter=alter)


def test_a_flood_ends_where_no_answer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "SMALL", 1000)
    pulled = list[str]()

    def pull(name: str) -> bytes:
        pulled.append(name)
        return bytes(100)

    for most, taken in ((0.0, 16), (4000.0, 48)):
        pulled.clear()
        with pytest.raises(ObjectPullError) as refused:
            Taking(None, lambda most=most: most).pulled([str(k) for k in range(10_000)], pull)
        assert "more than any answer to the question" in unread(str(refused.value)) and len(pulled) == taken
    with pytest.raises(ObjectPullError, match="it has 200000 pieces, at most 100000 are taken"):
        Taking().pulled([str(k) for k in range(200_000)], pull)


def test_nobody_is_waited_for_longer_than_the_deadline() -> None:
    """A piece that never comes; and pieces that come one by one, for ever."""

    def never(name: str) -> bytes:
        raise ObjectUnavailableError(name)

    def slowly(name: str) -> bytes:
        time.sleep(0.02)
        return b"a"

    with pytest.raises(ObjectPullError) as late:
        Taking(0.1).pulled(["a"], never, initial_backoff=0.01)
    assert not unread(str(late.value)), "Flower's own word: the node is lost, and asked again once it is back"
    with pytest.raises(ObjectPullError) as slow:
        Taking(0.1).pulled([str(k) for k in range(1000)], slowly)
    assert unread(str(slow.value)) == "it did not come within engine.deadline=0.1 s"
