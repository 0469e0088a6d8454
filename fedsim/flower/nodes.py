"""Which SuperNode is which client. Node ids are random and change when a node comes back; clients are asked who they
are, and everything else goes by client."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.errors import ConfigError, EngineError
from fedsim.flower.answers import said
from fedsim.flower.binding import Binding
from fedsim.flower.introductions import Known, Limits, known
from fedsim.flower.taking import unread

log = logging.getLogger(__name__)

REFRESH = 2.0  # seconds between looks for nodes that joined or left
AGAIN = 10.0  # seconds after which a refused node is asked again: it may have been restarted
QUERY_TTL = 300.0  # seconds
NODE_TROUBLE = (3, 4, 5)  # Flower's error codes of messages that a node lost, or of a node that is gone


@dataclass
class Nodes:
    """The live nodes of a run by client id; ``events`` receives who joined, was lost or refused."""

    grid: Grid
    num_clients: int
    path: Path | None = None  # nodes.jsonl
    check: Callable[[Known], str] | None = None  # why a node cannot take part, or nothing
    binding: Binding = field(default_factory=Binding)
    limits: Limits | None = None  # of what a node may say of itself
    of: dict[int, Known] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)  # node id to reason
    without: list[int] = field(default_factory=list)  # clients that the run began without
    missing: dict[int, str] = field(
        default_factory=dict
    )  # clients that it goes on without, and why, until they are back
    claims: dict[int, int] = field(default_factory=dict)  # refused node id to how many clients it would be
    names: dict[int, str] = field(
        default_factory=dict
    )  # node id to the name of its key, where keys are bound
    _asked: dict[str, int] = field(default_factory=dict)  # message to node
    _rivals: dict[int, Known] = field(default_factory=dict)  # client to a second node that claims to be it
    _later: dict[int, float] = field(default_factory=dict)  # refused or silent node to when it is asked again
    _looked: float = 0.0

    def event(self, what: str, **about: Any) -> None:
        """Note something in ``nodes.jsonl``."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "event": what, **about}) + "\n")

    @contextmanager
    def noting_end(self) -> Iterator[dict[str, Any]]:
        """How what happens within ends is noted: by an error, or as the mapping says that is filled meanwhile."""
        end: dict[str, Any] = {}
        try:
            yield end
        except BaseException as error:
            end |= {"status": "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"}
            end["error"] = said(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.event("ended", **end)

    def wait(self, wanted: int, limit: float, poll: float) -> None:
        """Until ``wanted`` clients are there; EngineError names the missing and the refused ones."""
        end, enough = time.monotonic() + limit, 0.0
        while len(self.of) < wanted:
            self.refresh()
            now, idle = time.monotonic(), not self._asked and not self._rivals
            stuck = idle and len(self.of) + self.turned_away >= wanted > len(self.of)
            enough = (enough or now) if stuck else 0.0
            if now > end or (stuck and now - enough > AGAIN / 2):
                raise EngineError(self._missing(wanted, limit))
            time.sleep(poll)

    def refresh(self) -> None:
        """Ask new nodes who they are and forget those that left, every ``REFRESH`` seconds; hear what they answer."""
        now = time.monotonic()
        if now - self._looked >= REFRESH:
            self._looked = now
            self.names = self.binding.names(self.grid)
            live = set(self.names if self.binding.clients else self.grid.get_node_ids())
            for client, node in list(self.of.items()):
                if node.id not in live:
                    self.lose(client, "it went offline")
            self.refused = {n: why for n, why in self.refused.items() if n in live}
            self._later = {n: at for n, at in self._later.items() if n in live}
            again = [n for n, at in self._later.items() if now > at]
            busy = {*self._asked.values(), *self.refused, *self._later, *(k.id for k in self._all())}
            self._ask([n for n in (*(live - busy), *again) if not self._strange(n)])
        if self._asked:
            for reply in self.grid.pull_messages(list(self._asked)):
                asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
                if asked is not None:
                    self._hear(asked, reply)

    @property
    def turned_away(self) -> int:
        """How many clients the refused nodes would have been: where keys are bound, those of their keys, whatever they
        say; a stranger is nobody's."""
        if not self.binding.clients:
            return sum(self.claims.get(n, 1) for n in self.refused)
        theirs = {c for n in self.refused for c in self.binding.clients.get(self.names.get(n, ""), ())}
        return len(theirs - self.of.keys())

    def lose(self, client: int, why: str) -> None:
        """The client's node is gone, with all clients that it is; a rival, if there is one, was its successor."""
        if (gone := self.of.get(client)) is None:
            return
        for c in [c for c, one in self.of.items() if one.id == gone.id]:
            del self.of[c]
            log.warning("client %d: %s is lost: %s", c, gone.name, why)
            self.event("lost", client=c, node=gone.id, reason=why)
            if (rival := self._rivals.pop(c, None)) is not None:
                self._admit(rival)

    def _strange(self, node: int) -> bool:
        """Whether the node's key is bound to no client: it is refused without a question."""
        why = self.binding.stranger(self.names.get(node, ""), self.names.values())
        if why:
            self._refuse(node, why)
        return bool(why)

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
            if why := unread(str(reply.error.reason)):
                self._refuse(node, said(f"its introduction is none: {why}"))
                return
            if any(k.id == node for k in self._all()):
                return  # a challenged node that fell silent: `refresh` sees it leave
            if reply.error.code in NODE_TROUBLE:  # it went away before it answered: it may come back
                self.event("silent", node=node, reason=said(str(reply.error.reason)))
                self._later[node] = time.monotonic() + AGAIN
                return
            self._refuse(node, said(f"it cannot run the app: {reply.error.reason}"))
            return
        try:
            found = known(node, reply.content, self.limits or Limits(self.num_clients))
        except ConfigError as error:
            self._refuse(node, str(error))
            return
        except EngineError:
            raise  # of the server's own
        except Exception as error:  # of what nobody thought of
            self._refuse(node, said(f"its introduction is none: {type(error).__name__}: {error}"))
            return
        mine, name = {c for c, k in self.of.items() if k.id == node}, self.names.get(node, "")
        why = next((w for one in found if (w := self.binding.another(name, one.client))), "")
        if gone := sorted(mine - {one.client for one in found}):
            why = why or f"it says that it is client {found[0].client}, but it is client {gone[0]} already"
        why = why or next((w for one in found if self.check and (w := self.check(one))), "")
        if why:
            self.claims[node] = len(found)
            self._refuse(node, why)
            return
        for one in found:
            self._introduced(node, one)

    def _introduced(self, node: int, found: Known) -> None:
        other = self.of.get(found.client)
        if other is None or other.instance == found.instance:
            self._admit(found)
        if other is not None and other.id == node and (rival := self._rivals.pop(found.client, None)):
            self._refuse(
                rival.id,
                f"client {found.client} is {found.name} already, which answers; give {rival.name} another partition-id",
            )
        elif other is not None and other.instance != found.instance:
            self._rivals[found.client] = found  # whether the first one lives shows by its answer
            self._ask([other.id])

    def _admit(self, node: Known) -> None:
        before = self.of.get(node.client)
        self.of[node.client] = node
        self.refused.pop(node.id, None)
        self.missing.pop(node.client, None)
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
