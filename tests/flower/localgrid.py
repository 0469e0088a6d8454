"""A grid in this process: messages pass through Flower's own wire format, the real ClientApp answers them.

It leans on names of Flower that are not public, for the version that pyproject.toml pins.
"""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid

from fedsim.flower import client, server
from fedsim.flower.options import configuration

GONE = 5  # Flower's error code of a node that is offline


@dataclass
class LocalGrid(Grid):
    """Nodes by id, each with its node config; ``spoil(message)`` may answer in a node's place, or say "silent", and
    ``alter(message, content)`` change what a node answers, before it goes over the wire; ``forge(message, objects)``
    change that as Flower's objects by id, the whole under the last one."""

    run_config: dict[str, Any]
    nodes: dict[int, dict[str, Any]] = field(default_factory=dict)
    spoil: Callable[[Message], Any] = lambda message: None
    alter: Callable[[Message, RecordDict], RecordDict | None] = lambda message, content: None
    forge: Callable[[Message, dict[str, bytes]], None] = lambda message, objects: None
    names: dict[int, str] = field(default_factory=dict)  # node id to the name of its registered key
    bytes_down: int = 0
    bytes_up: int = 0
    log: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)  # node, type, ask
    _replies: dict[str, Callable[[], Message]] = field(default_factory=dict)
    _number: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(m) for m in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i)() for i in list(message_ids) if i in self._replies]

    def _push(self, message: Message) -> str:
        name = f"message-{next(self._number)}"
        message.metadata.__dict__["_message_id"] = name
        node = message.metadata.dst_node_id
        ask = {**message.content["ask"], **message.content["broadcast"]} if "ask" in message.content else {}
        self.log.append((node, message.metadata.message_type, ask))
        spoilt = self.spoil(message)
        if isinstance(spoilt, str):
            return name
        if isinstance(spoilt, Error):
            reply = Message(spoilt, reply_to=message)
        elif node not in self.nodes:
            reply = Message(Error(GONE, "node unavailable"), reply_to=message)
        else:
            reply = self._call(message, node)
        self._replies[name] = lambda: self._pulled(message, reply)
        return name

    def _pulled(self, message: Message, reply: Message) -> Message:
        """As the ServerApp receives it: taken apart into Flower's objects, and made of these again."""
        if reply.has_error():
            return reply
        there = {n: part.deflate() for n, part in get_all_nested_objects(reply.content).items()}
        there[reply.content.object_id] = there.pop(reply.content.object_id)
        try:
            self.forge(message, there)
            came = http_grid.pull_objects([*there], there.__getitem__)
            whole = http_grid.inflate_object_from_contents(list(there)[-1], came)
        except ObjectPullError as error:
            word = Message(Error(3, f"Reply message objects are unavailable. {error}"), reply_to=message)
            word.metadata.__dict__["_src_node_id"] = 1  # the server's own, as Flower's grid puts it
            return word
        reply.content = cast(RecordDict, whole)
        return reply

    def _call(self, message: Message, node: int) -> Message:
        wire, about = recorddict_to_proto(message.content), message.metadata
        arrived = Message(recorddict_from_proto(wire), about.dst_node_id, about.message_type)
        arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
        context = Context(1, node, self.nodes[node], RecordDict(), self.run_config)
        reply = client.app(arrived, context)
        altered = self.alter(message, reply.content)  # in place, or another content
        back = recorddict_to_proto(reply.content if altered is None else altered)
        if message.metadata.message_type == "train":
            self.bytes_down += wire.ByteSize()
            self.bytes_up += back.ByteSize()
        reply.content = reply.content if altered is None else altered
        return reply

    # what a grid must have and the apps do not use
    def set_run(self, run: Any) -> None: ...
    @property
    def run(self) -> Any: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
    def send_and_receive(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_nodes(self) -> Any:
        return [NodeInfo(node_id=n, name=self.names.get(n)) for n in self.nodes]


def deploy(
    folder: Path,
    *overrides: str,
    clients: int = 3,
    nodes: dict[int, dict[str, Any]] | None = None,
    **grid: Any,
) -> tuple[Any, LocalGrid]:
    """Run the ServerApp's own function on a local grid; clients' state goes to ``folder/state-<client>``."""
    settings = [f"num_clients={clients}", f"dir={folder / 'run'}", "tracker=quiet", "engine.poll=0.001"]
    text = shlex.join([*settings, *overrides])
    run_config = {"overrides": text}
    default = {100 + k: {"partition-id": k, "state-dir": str(folder / f"state-{k}")} for k in range(clients)}
    local = LocalGrid(run_config, nodes if nodes is not None else default, **grid)
    return server.serve(local, configuration(run_config)), local


def node(folder: Path, client: int, **config: Any) -> dict[str, Any]:
    return {"partition-id": client, "state-dir": str(folder / f"state-{client}"), **config}


def asked(message: Any) -> tuple[int, int] | None:
    """Round (from 1) and client of a message that is work."""
    if "ask" not in message.content:
        return None
    return message.content["broadcast"]["round"] + 1, message.content["ask"]["client"]


class Spoiler:
    """Calls ``act(grid, message)`` the first time that a message for (round, client) is sent."""

    def __init__(self, act: Any, *places: tuple[int, int]):
        self.act, self.places, self.grid = act, list(places), None

    def __call__(self, message: Any) -> Any:
        if (place := asked(message)) in self.places:
            self.places.remove(place)
            return self.act(message)
        return None


def wait_until(found: Callable[[], Any], seconds: float, what: str) -> Any:
    """What ``found()`` gives, as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds:g} s")
