"""Which SuperNode is which client. Node ids are random and change when a node comes back; clients are asked who they
are, and everything else goes by client."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.errors import EngineError
from fedsim.flower.wire import WIRE, config_of

log = logging.getLogger(__name__)

REFRESH = 2.0  # seconds between looks for nodes that joined or left
AGAIN = 10.0  # seconds after which a refused node is asked again: it may have been restarted
QUERY_TTL = 300.0  # seconds


@dataclass(frozen=True)
class Known:
    """What a node said of itself."""

    id: int
    client: int
    samples: int
    counts: list[int]  # samples per class, of nodes with their own data
    own: bool  # its data are its own, not a part of a common data set
    partition: str
    layout: str
    host: str
    instance: str  # of its state folder: the same after a restart
    base: str = ""  # of its model: name and sha256 of the frozen part, nothing where all is trained
    base_sha256: str = ""
    contract: str = ""  # JSON: versions, and of own data classes, columns, statistics

    @property
    def name(self) -> str:
        """For messages."""
        return f"node {self.id} on {self.host}"


@dataclass
class Nodes:
    """The live nodes of a run by client id; ``events`` receives who joined, was lost or refused."""

    grid: Grid
    num_clients: int
    path: Path | None = None  # nodes.jsonl
    check: Callable[[Known], str] | None = None  # why a node cannot take part, or nothing
    of: dict[int, Known] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)  # node id to reason
    _asked: dict[str, int] = field(default_factory=dict)  # message to node
    _rivals: dict[int, Known] = field(default_factory=dict)  # client to a second node that claims to be it
    _later: dict[int, float] = field(default_factory=dict)  # refused node to when it is asked again
    _looked: float = 0.0

    def event(self, what: str, **about: Any) -> None:
        """Note something in ``nodes.jsonl``."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "event": what, **about}) + "\n")

    def wait(self, wanted: int, limit: float, poll: float) -> None:
        """Until ``wanted`` clients are there; EngineError names the missing and the refused ones."""
        end, enough = time.monotonic() + limit, 0.0
        while len(self.of) < wanted:
            self.refresh()
            now, idle = time.monotonic(), not self._asked and not self._rivals
            stuck = idle and len(self.of) + len(self.refused) >= wanted > len(self.of)
            enough = (enough or now) if stuck else 0.0
            if now > end or (stuck and now - enough > AGAIN / 2):
                raise EngineError(self._missing(wanted, limit))
            time.sleep(poll)

    def refresh(self) -> None:
        """Ask new nodes who they are and forget those that left, every ``REFRESH`` seconds; hear what they answer."""
        now = time.monotonic()
        if now - self._looked >= REFRESH:
            self._looked = now
            live = set(self.grid.get_node_ids())
            for client, node in list(self.of.items()):
                if node.id not in live:
                    self.lose(client, "it went offline")
            self.refused = {n: why for n, why in self.refused.items() if n in live}
            again = [n for n, at in self._later.items() if n in live and now > at]
            busy = {*self._asked.values(), *self.refused, *(k.id for k in self._all())}
            self._ask([*(live - busy), *again])
        if self._asked:
            for reply in self.grid.pull_messages(list(self._asked)):
                self._hear(self._asked.pop(reply.metadata.reply_to_message_id), reply)

    def lose(self, client: int, why: str) -> None:
        """The client's node is gone; a rival, if there is one, was its successor."""
        gone = self.of.pop(client, None)
        if gone is None:
            return
        log.warning("client %d: %s is lost: %s", client, gone.name, why)
        self.event("lost", client=client, node=gone.id, reason=why)
        if (rival := self._rivals.pop(client, None)) is not None:
            self._admit(rival)

    def _ask(self, ids: Iterable[int]) -> None:
        ids = list(ids)
        for n in ids:
            self._later.pop(n, None)
        if ids:
            empty = RecordDict({"hello": ConfigRecord()})
            messages = [Message(empty, n, "query", ttl=QUERY_TTL) for n in ids]
            sent = zip(self.grid.push_messages(messages), ids, strict=True)
            self._asked.update({m: n for m, n in sent if m})

    def _hear(self, node: int, reply: Message) -> None:
        if reply.has_error():
            if any(k.id == node for k in self._all()):
                return  # a challenged node that fell silent: `refresh` sees it leave
            self._refuse(node, f"it cannot run the app: {reply.error.reason}")
            return
        about = config_of(reply.content, "node")
        if "refused" in about:
            self._refuse(node, str(about["refused"]))
            return
        if (spoken := about.pop("wire", 0)) != WIRE:
            self._refuse(
                node, f"its fedsim speaks version {spoken} to nodes, this one {WIRE}; install the same"
            )
            return
        known = Known(id=node, **about)
        why = self.check(known) if self.check else ""
        if why:
            self._refuse(node, why)
            return
        other = self.of.get(known.client)
        if other is None or other.instance == known.instance:
            self._admit(known)
        if other is not None and other.id == node and (rival := self._rivals.pop(known.client, None)):
            self._refuse(
                rival.id,
                f"client {known.client} is {known.name} already, which answers; give {rival.name} another partition-id",
            )
        elif other is not None and other.instance != known.instance:
            self._rivals[known.client] = known  # whether the first one lives shows by its answer
            self._ask([other.id])

    def _admit(self, node: Known) -> None:
        before = self.of.get(node.client)
        self.of[node.client] = node
        self.refused.pop(node.id, None)
        if before is None or before.id != node.id:
            log.warning("client %d is %s", node.client, node.name)
            self.event("joined", client=node.client, node=node.id, host=node.host, samples=node.samples)

    def _refuse(self, node: int, why: str) -> None:
        if self.refused.get(node) != why:
            log.warning("node %d is refused: %s", node, why)
            self.event("refused", node=node, reason=why)
        self.refused[node] = why
        self._later[node] = time.monotonic() + AGAIN

    def _all(self) -> list[Known]:
        return [*self.of.values(), *self._rivals.values()]

    def _missing(self, wanted: int, limit: float) -> str:
        gone = [c for c in range(self.num_clients) if c not in self.of]
        text = f"{len(self.of)} of {wanted} clients are there; missing: {', '.join(map(str, gone))}"
        text += "".join(f"\nnode {n} is refused: {why}" for n, why in self.refused.items())
        return f"{text}\nstart their SuperNodes, or raise engine.start ({limit:g} s)"
