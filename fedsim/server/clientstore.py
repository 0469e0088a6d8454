"""What clients keep between rounds. It belongs to the simulator; workers never hold the only copy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.errors import CheckpointError
from fedsim.server import segments
from fedsim.server.segments import Schema, Segment, schema_of

State = Mapping[str, Tensor]
FULL = 64 << 20  # bytes of a segment; one with less than half of that is small
LOOSE = 8  # so many segments that are small or half forgotten are put together


class ClientStore:
    """Client id to state, in memory up to a budget and beyond that in segment files in ``folder``.

    A segment (see ``segments``) is written once. Proposed states count in the budget like accepted ones, and go to
    segments of their own where there is no room. ``flush`` makes what is accepted durable and returns an index (client
    to segment and round) that a checkpoint keeps; a segment is deleted when neither a current state nor a checkpoint
    that is kept needs it. Without a folder everything stays in memory.
    """

    held: Mapping[str, frozenset[str]]  # names of the segments that each checkpoint on disk needs

    def __init__(self, folder: Path | None, memory_bytes: int):
        self._folder = folder
        self._budget = memory_bytes
        self._clear()

    def _clear(self) -> None:
        self._serial = 0  # of the next segment
        self._bytes = 0  # in memory
        self._round: dict[int, int] = {}  # of each accepted state
        self._clean: OrderedDict[int, State] = (
            OrderedDict()
        )  # accepted, also in a segment; least recently used first
        self._unsaved: dict[int, State] = {}  # accepted, in no segment yet
        self._where: dict[int, Segment] = {}  # accepted, in a segment
        self._pending: dict[int, int] = {}  # round of each proposed state
        self._proposed: dict[int, State] = {}  # those in memory
        self._set_aside: dict[int, Segment] = {}  # those in a segment
        self._segments: dict[str, Segment] = {}
        self._kept: set[str] = set()  # segments that checkpoints on disk name
        self.held = {}
        self._schemas: dict[Schema, Schema] = {}

    def __len__(self) -> int:
        return len(self._round)

    def get(self, client: int) -> State:
        """The newest accepted or proposed state of ``client``; empty if it never took part."""
        if client in self._pending:
            held = self._proposed.get(client)
            return self._set_aside[client].read(client) if held is None else held
        if client in self._unsaved:
            return self._unsaved[client]
        if client in self._clean:
            self._clean.move_to_end(client)
            return self._clean[client]
        if client not in self._where:
            return {}
        state = self._clean[client] = self._where[client].read(client)
        self._bytes += _size(state)
        self._fit()
        return state

    def propose(self, client: int, round: int, state: State) -> None:
        """A client's new state, made in ``round``; it counts from now on but is kept only by ``accept``."""
        if client in self._pending:
            self._withdraw(client)
        copy = {k: v.clone() for k, v in state.items()}
        self._pending[client] = round
        self._proposed[client] = copy
        self._bytes += _size(copy)
        self._fit()

    def discard(self) -> None:
        """Forget what was proposed since the last ``accept``: the round did not finish."""
        for client in self._pending:
            self._withdraw(client)
        self._pending.clear()
        self._tidy()

    def accept(self) -> None:
        """The round is finished: keep what was proposed."""
        for client, round in self._pending.items():
            for held in (self._clean, self._unsaved):
                if client in held:
                    self._bytes -= _size(held.pop(client))
            if client in self._where:
                self._where.pop(client).drop(client)
            if client in self._proposed:
                self._unsaved[client] = self._proposed[client]
            else:
                self._where[client] = self._set_aside[client]
            self._round[client] = round
        for memory in (self._pending, self._proposed, self._set_aside):
            memory.clear()
        with self._writing():
            self._tidy()

    def last_round(self, client: int) -> int:
        """Round of the last accepted state of ``client``; -1 if none."""
        return self._round.get(client, -1)

    def flush(self) -> dict[str, Any]:
        """Write what is not on disk yet; the index that ``restore`` takes."""
        self._save_accepted()
        self._tidy()
        live = sorted({segment.path.name for segment in self._where.values()})
        self._kept.update(live)
        clients = {str(c): [self._where[c].path.name, self._round[c]] for c in sorted(self._round)}
        return {"clients": clients, "sha256": {name: self._segments[name].checksum for name in live}}

    def restore(
        self, index: Mapping[str, Any], upgrade: Callable[[State], dict[str, Tensor]] | None = None
    ) -> None:
        """Take the states that ``index`` names; everything else is forgotten.

        With ``upgrade``, which brings states of an older format to today's, they are written anew by ``flush``.
        """
        self._clear()
        owners: dict[str, set[int]] = {}
        for client, (name, round) in index["clients"].items():
            owners.setdefault(name, set()).add(int(client))
            self._round[int(client)] = round
        for name, clients in sorted(owners.items()):
            if self._folder is None:
                raise CheckpointError(f"client states: {name} cannot be read: the run has no folder")
            segments.check_name(name)
            segment = segments.opened(self._folder / name, index["sha256"].get(name), self._schemas)
            segment.only(clients)
            self._segments[name] = segment
            self._where.update(dict.fromkeys(clients, segment))
        if self._folder is not None:  # files of other checkpoints are not written over
            files = self._folder.glob("states-*.safetensors")
            self._serial = max((int(file.stem.split("-")[1]) + 1 for file in files), default=0)
        self._kept = set(owners)
        if upgrade is not None:
            for client in list(self._where):
                self._renew(client, upgrade)

    def _renew(self, client: int, upgrade: Callable[[State], dict[str, Tensor]]) -> None:
        """Put an accepted state through ``upgrade``; it lies in no segment then, until there is no room for it."""
        segment = self._where.pop(client)
        self._unsaved[client] = upgrade(segment.read(client))
        segment.drop(client)
        self._bytes += _size(self._unsaved[client])
        self._fit()

    def prune(self) -> None:
        """Delete segments that neither a current state nor a checkpoint in ``held`` needs.

        Call after the new checkpoint is in place.
        """
        self._kept = {segment.path.name for segment in self._where.values()}.union(*self.held.values())
        self._segments = {name: s for name, s in self._segments.items() if s.places or name in self._kept}
        if self._folder is not None and self._folder.exists():
            for path in (*self._folder.glob("states-*.safetensors"), *self._folder.glob(".states-*.tmp")):
                if path.name not in self._segments and path.name not in self._kept:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Within a round; the loop has its own words for a checkpoint that could not be written."""
        try:
            yield
        except OSError as e:
            raise CheckpointError(
                f"client states could not be written to {self._folder} ({e}). Make room and type the same command "
                "again: it goes on from the last checkpoint"
            ) from e

    def _withdraw(self, client: int) -> None:
        """A proposed state no longer counts."""
        if client in self._proposed:
            self._bytes -= _size(self._proposed.pop(client))
        else:
            self._set_aside.pop(client).drop(client)

    def _fit(self) -> None:
        """Bring memory within the budget: forget what lies on disk too; if that is not enough, write the rest."""
        if self._bytes <= self._budget or self._folder is None:
            return
        self._forget(self._budget)
        if self._bytes > self._budget:
            with self._writing():
                self._save_accepted()
                self._save_proposed()
            self._forget(self._budget // 2)

    def _forget(self, budget: int) -> None:
        """Drop states from memory that lie on disk, least recently used first."""
        while self._bytes > budget and self._clean:
            self._bytes -= _size(self._clean.popitem(last=False)[1])

    def _save_accepted(self) -> None:
        if self._unsaved:
            self._where.update(dict.fromkeys(self._unsaved, self._write(self._unsaved)))
            self._clean.update(self._unsaved)
            self._unsaved = {}

    def _save_proposed(self) -> None:
        """They may have to be withdrawn, and so have a segment of their own."""
        if self._proposed:
            self._set_aside.update(dict.fromkeys(self._proposed, self._write(self._proposed)))
            self._bytes -= sum(map(_size, self._proposed.values()))
            self._proposed = {}

    def _write(self, states: Mapping[int, State]) -> Segment:
        schemas = {c: self._schema(states[c]) for c in sorted(states)}
        return self._add(segments.write(self._next(), schemas, lambda client, name: states[client][name]))

    def _tidy(self) -> None:
        """Between rounds: put loose segments together, a state at a time, and delete what nobody needs."""
        loose = [s for s in self._segments.values() if s.places and s.live < max(FULL // 2, s.size // 2)]
        if len(loose) >= LOOSE and not self._pending:
            self._merge(loose)
        for name, segment in list(self._segments.items()):
            if not segment.places and name not in self._kept:
                segment.path.unlink(missing_ok=True)
                del self._segments[name]

    def _merge(self, loose: list[Segment]) -> None:
        """Copy what counts in ``loose`` into new segments, each as soon as it is full."""
        batch, size = dict[int, Segment](), 0
        for client, segment in [(c, s) for s in loose for c in s.places]:
            batch[client] = segment
            size += sum(kind.nbytes for kind in segment.places[client][0])
            if size >= FULL:
                self._move(batch)
                batch, size = {}, 0
        if batch:
            self._move(batch)

    def _move(self, batch: Mapping[int, Segment]) -> None:
        schemas = {c: s.places[c][0] for c, s in batch.items()}
        new = segments.write(self._next(), schemas, lambda c, name: batch[c].read(c, name)[name])
        for client, old in batch.items():
            old.drop(client)
        self._where.update(dict.fromkeys(batch, self._add(new)))

    def _next(self) -> Path:
        if self._folder is None:
            raise CheckpointError("client states cannot be written: the run has no folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._serial += 1
        return self._folder / f"states-{self._serial - 1:06d}.safetensors"

    def _add(self, segment: Segment) -> Segment:
        self._segments[segment.path.name] = segment
        return segment

    def _schema(self, state: State) -> Schema:
        schema = schema_of(state)
        return self._schemas.setdefault(schema, schema)


def _size(state: State) -> int:
    return sum(t.numel() * t.element_size() for t in state.values()) + 64 * len(state)
