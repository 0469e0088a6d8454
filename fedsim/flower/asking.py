"""One exchange over the grid: each client of the cohort gets its message, again if its node returns as another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedsim.errors import ClientError
from fedsim.flower.answers import NodeAnswer, absent, failed, said
from fedsim.flower.nodes import NODE_TROUBLE, Nodes
from fedsim.flower.taking import unread

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, DecodeError)
LOSSES = 20  # of one client in an exchange: a node that is back at once, every time, is no node that works
GRACE = 60.0  # seconds that a message lives beyond the deadline


@dataclass
class GridExchange:
    """``content(client, whole)`` is what a client receives; ``answer(client)`` waits for what it sends.

    The message is ``whole`` once the client said that it has not what the message relies on. ``read(content, client,
    whole)`` makes an answer of a reply to it, or says by a ``ClientError`` why it is none. A reply is that of the
    client whose node was asked, whatever it says; one that is none is that client's failure.

    Answers wait at the link until they are pulled: ``one_by_one``, that of the client whose turn it is. Once half of
    the deadline has passed, others are looked at too, no more than one ahead: who must be asked again needs the rest.
    """

    grid: Grid
    nodes: Nodes
    clients: Sequence[int]
    content: Callable[[int, bool], RecordDict]
    deadline: float | None  # seconds; None: no limit
    poll: float
    retries: int  # further attempts for a client whose process broke down
    read: Callable[[RecordDict, int, bool], NodeAnswer]
    round: int
    sent: Callable[[], None] = lambda: None  # called once messages are out
    one_by_one: bool = False
    _began: float = field(default_factory=time.monotonic)
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # message to client and node
    _done: dict[int, NodeAnswer] = field(default_factory=dict)
    _closed: set[int] = field(default_factory=set)  # clients whose answer is known
    _crashes: Counter[int] = field(default_factory=Counter)
    _losses: Counter[int] = field(default_factory=Counter)
    _lacking: Counter[int] = field(default_factory=Counter)  # clients to bytes they were sent in vain

    def answer(self, client: int) -> NodeAnswer:
        """The client's answer; after the deadline, that it is absent."""
        while client not in self._done:
            self._look(client)
            if client in self._done:
                break
            if client in self.nodes.missing:
                self._close(client, failed(absent(client, "failed", ""), self.nodes.missing[client]))
                break
            if self.deadline is not None and time.monotonic() - self._began > self.deadline:
                here = client in self.nodes.of
                why = "no reply" if here else "its node is not connected"
                self._close(
                    client, absent(client, "dropped", f"{why} within engine.deadline={self.deadline:g} s")
                )
                break
            time.sleep(self.poll)
        return self._done.pop(client)

    def _look(self, client: int) -> None:
        self.nodes.refresh()
        self._send()
        for reply in self._pulled(client):
            sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if sent is None:
                self.nodes.event("stray", round=self.round + 1, node=reply.metadata.src_node_id)
            elif sent[0] not in self._closed:
                self._take(reply, *sent)

    def _pulled(self, client: int) -> Iterator[Message]:
        """Replies that came, in the order in which they are to be looked at."""
        if not self.one_by_one:
            yield from self._pull(list(self._sent))
            return
        late = self.deadline is not None and time.monotonic() - self._began > self.deadline / 2
        for name in sorted(self._sent, key=lambda name: self._sent[name][0] != client):
            if name in self._sent and (self._sent[name][0] == client or (late and not self._done)):
                yield from self._pull([name])

    def _pull(self, names: list[str]) -> list[Message]:
        """One that cannot even be unpacked is an answer too: that of a client that failed."""
        if not names:
            return []
        try:
            return list(self.grid.pull_messages(names))
        except UNREADABLE as error:
            if len(names) > 1:
                return [message for name in names for message in self._pull([name])]
            client, node = self._sent.pop(names[0])
            if client not in self._closed:
                self._refuse(client, node, f"{type(error).__name__}: {error}")
            return []

    def _take(self, reply: Message, client: int, node: int) -> None:
        """A reply to the message that went to ``client`` at ``node``."""
        if reply.has_error():
            self._trouble(reply.error.code, str(reply.error.reason), client, node)
        elif reply.metadata.src_node_id != node:
            self._refuse(client, node, f"it came from node {reply.metadata.src_node_id}")
        else:
            try:
                answer = self.read(reply.content, client, client in self._lacking)
            except ClientError as error:
                self._refuse(client, node, str(error))
            except Exception as error:  # of what nobody thought of
                self._refuse(client, node, f"{type(error).__name__}: {error}")
            else:
                self._hear(client, answer)

    def _trouble(self, code: int, reason: str, client: int, node: int) -> None:
        """Flower's word in the place of a reply; it comes from the server itself where the node broke off in it."""
        if why := unread(reason):
            self._refuse(client, node, why)
        elif code in NODE_TROUBLE:
            known = self.nodes.of.get(client)
            if known is not None and known.id == node:
                self.nodes.lose(client, said(reason))
            self._losses[client] += 1
            if self._losses[client] >= LOSSES and client not in self._closed:
                why = f"its node was lost {LOSSES} times in one exchange, at last: {reason}"
                self._close(client, absent(client, "failed", said(why)))
        else:
            self._crashed(client, node, said(reason))

    def _refuse(self, client: int, node: int, why: str) -> None:
        """What came is no answer to what was asked."""
        why = said(f"its reply is not taken: {why}")
        self.nodes.event("not_taken", round=self.round + 1, client=client, node=node, reason=why)
        self._close(client, failed(absent(client, "failed", ""), why))

    def _send(self) -> None:
        """Messages to those who have none at their present node."""
        out = set(self._sent.values())
        here = [c for c in self.clients if c in self.nodes.of and c not in self._closed]
        todo = [c for c in here if (c, self.nodes.of[c].id) not in out]
        if not todo:
            return
        ttl = None if self.deadline is None else self.deadline + GRACE
        messages = []
        for c in todo:
            target = self.nodes.of[c].id
            content = self.content(c, c in self._lacking)
            messages.append(Message(content, target, "train", ttl=ttl, group_id=str(self.round + 1)))
        for c, message in zip(todo, self.grid.push_messages(messages), strict=True):
            if message:
                self._sent[message] = c, self.nodes.of[c].id
        self.sent()

    def _hear(self, client: int, answer: NodeAnswer) -> None:
        outcome = answer.outcome
        if answer.lacks and client not in self._lacking:
            self._lacking[client] = outcome.bytes_down
            self.nodes.event("lacking", round=self.round + 1, client=client)
            return  # `_send` does the rest
        outcome.bytes_down += self._lacking[client]
        self._close(client, answer)

    def _crashed(self, client: int, node: int, reason: str) -> None:
        self._crashes[client] += 1
        self.nodes.event("crashed", round=self.round + 1, client=client, node=node, reason=reason)
        if self._crashes[client] > self.retries:
            self._close(client, absent(client, "failed", f"its process broke down: {reason.strip()}"))

    def _close(self, client: int, answer: NodeAnswer) -> None:
        self._done[client] = answer
        self._closed.add(client)
