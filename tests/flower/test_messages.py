"""Messages to nodes that were altered on the way: each is answered by a line that names what is wrong, and the node
goes on serving."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import asked, deploy
from real import hashes
from test_hostile import HOSTILE, TINY

from fedsim.flower import nodes as nodes_module
from fedsim.flower.client import app

Change = Callable[[RecordDict], Any]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)


def put(record: str, **fields: Any) -> Change:
    return lambda content: content[record].update({k.replace("__", ":"): v for k, v in fields.items()})


def drop(record: str, *names: str) -> Change:
    def change(content: RecordDict) -> None:
        for name in names or (record,):
            del (content[record] if names else content)[name]

    return change


BELOW = "expected a whole number, not below 0"
WRONG: list[tuple[Change, str]] = [
    (drop("ask"), "the message has no record 'ask'"),
    (drop("broadcast"), "the message has no record 'broadcast'"),
    (lambda c: c.update(ask=MetricRecord({"client": 1})), "the message has no record 'ask'"),
    (drop("broadcast.payload"), "broadcast lacks 'payload'"),
    (lambda c: c.update({"broadcast.payload": ConfigRecord({"w": 1})}), "broadcast lacks 'payload'"),
    *((drop("ask", name), f"ask lacks '{name}'") for name in ("run", "client")),
    *((drop("broadcast", name), f"broadcast lacks '{name}'") for name in ("round", "fold")),
    (put("broadcast", round=-3), f"broadcast.round is -3, {BELOW}"),
    (put("broadcast", round="1"), f"broadcast.round is '1', {BELOW}"),
    (put("ask", exchange=-1), f"ask.exchange is -1, {BELOW}"),
    (put("ask", client=[1]), rf"ask.client is \[1\], {BELOW}"),
    (put("ask", run="../../up"), "no name of a run"),
    (put("ask", state=[-1, 0]), "ask.state is .*, expected two"),
    (put("ask", each__steps="many"), "ask.each:steps is 'many'"),
    (put("ask", each__turns=-9), f"ask.each:turns is -9, {BELOW}"),
    (put("ask", row__rows=3), "ask.row:rows is 3, expected Payload"),
    (put("ask", admin=True), "ask holds 'admin', which is not known"),
    (put("broadcast", fold=5), "broadcast.fold is 5, expected names"),
    (put("broadcast", task="erase"), "has no such method"),
    (put("broadcast", architecture=7), r"IndexError: .* \(\w+\.py, line \d+\)"),
    (put("broadcast", evil=1), "broadcast holds 'evil', which is not known"),
]


def test_a_message_that_is_none_is_answered_by_a_line(tmp_path: Path) -> None:
    def spoil(message: Message) -> None:
        if (place := asked(message)) and place[1] == HOSTILE and place[0] <= len(WRONG):
            for name, record in list(message.content.items()):
                if isinstance(record, ConfigRecord):  # all clients share it
                    message.content[name] = ConfigRecord(dict(record))
            WRONG[place[0] - 1][0](message.content)

    run, _ = deploy(tmp_path, *TINY, f"rounds={len(WRONG) + 1}", "strategy=scaffold", spoil=spoil)
    for (_, reason), row in zip(WRONG, run.rows, strict=False):
        (failure,) = row["failures"]
        assert failure["client"] == HOSTILE and re.search(reason, failure["reason"]), failure
        assert "\n" not in failure["reason"]
        if "the message" in reason or "expected" in reason or "lacks" in reason:
            assert re.search(r"\(wire.py, line \d+\)", failure["reason"])
    assert run.rows[-1]["failures"] == [] and len(set(hashes(tmp_path / "run"))) == len(run.rows)
    kept = {p.name for p in (tmp_path / f"state-{HOSTILE}").rglob("state-*")}
    assert kept == {f"state-{len(WRONG):06d}-000.safetensors"}


def test_a_question_that_is_none_is_answered_too(tmp_path: Path) -> None:
    words = {"overrides": 'num_clients=3 model=linear "data.contract={normalize: agreed}"'}
    about = {"partition-id": 0, "state-dir": str(tmp_path)}
    for content in (
        RecordDict({"contract": ConfigRecord({"mean": 3})}),
        RecordDict({"contract": MetricRecord({})}),
    ):
        message = Message(content, 1, "query")
        message.metadata.__dict__["_message_id"] = "m"
        reply = app(message, Context(1, 1, about, RecordDict(), words))
        assert "Error" in reply.content["node"]["refused"]
