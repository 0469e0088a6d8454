"""What clients keep between rounds. It belongs to the simulator; workers never hold the only copy."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsim.errors import CheckpointError

State = Mapping[str, Tensor]


class ClientStore:
    """Client id to state, in memory up to a budget and beyond that in segment files in ``folder``.

    A segment is a safetensors file with the states of many clients, written once. ``flush`` makes everything durable
    and returns an index (client to segment and round) that a checkpoint keeps; ``prune`` deletes segments that no kept
    index names.
    """

    def __init__(self, folder: Path | None, memory_bytes: int):
        self._folder = folder
        self._budget = memory_bytes
        self._hot: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._dirty: set[int] = set()
        self._where: dict[int, str] = {}
        self._round: dict[int, int] = {}
        self._bytes = 0
        self._serial = 0
        self._pending: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self._sums: dict[str, str] = {}  # segment to sha256

    def __len__(self) -> int:
        return len(self._round)

    def get(self, client: int) -> State:
        """The newest accepted state of ``client``; empty if it never took part."""
        if client in self._pending:
            return self._pending[client][1]
        if client in self._hot:
            self._hot.move_to_end(client)
            return self._hot[client]
        if client not in self._where:
            return {}
        state = self._read(client)
        self._keep(client, state)
        return state

    def propose(self, client: int, round: int, state: State) -> None:
        """A client's new state, made in ``round``; it counts from now on but is kept only by ``accept``."""
        self._pending[client] = (round, {k: v.clone() for k, v in state.items()})

    def discard(self) -> None:
        """Forget what was proposed since the last ``accept``: the round did not finish."""
        self._pending.clear()

    def accept(self) -> None:
        """The round is finished: keep what was proposed."""
        for client, (round, state) in self._pending.items():
            self._drop(client)
            self._keep(client, state)
            self._dirty.add(client)
            self._round[client] = round
        self._pending.clear()
        if self._bytes > self._budget and self._folder is not None:
            self._spill()

    def last_round(self, client: int) -> int:
        """Round of the last accepted state of ``client``; -1 if none."""
        return self._round.get(client, -1)

    def flush(self) -> dict[str, Any]:
        """Write what is not on disk yet; the index that ``restore`` takes."""
        if self._dirty:
            self._write(sorted(self._dirty))
        live = sorted(set(self._where.values()))
        self._sums = {name: self._sums.get(name) or self._sum(name) for name in live}
        clients = {str(c): [self._where[c], self._round[c]] for c in sorted(self._round)}
        return {"clients": clients, "sha256": self._sums}

    def restore(
        self, index: Mapping[str, Any], upgrade: Callable[[State], dict[str, Tensor]] | None = None
    ) -> None:
        """Take the states that ``index`` names; everything else is forgotten.

        With ``upgrade``, which brings states of an older format to today's, they are written anew by ``flush``.
        """
        self.__init__(self._folder, self._budget)  # type: ignore[misc]
        for client, (segment, round) in index["clients"].items():
            self._where[int(client)], self._round[int(client)] = segment, round
        for segment in sorted(set(self._where.values())):
            if self._folder is None or not (self._folder / segment).exists():
                raise CheckpointError(
                    f"client states: {self._folder}/{segment} is missing; resume=never starts afresh"
                )
            if self._sum(segment) != index["sha256"].get(segment):
                raise CheckpointError(
                    f"client states: {self._folder}/{segment} does not match its checksum; resume=never starts afresh"
                )
            self._sums[segment] = index["sha256"][segment]
            self._serial = max(self._serial, int(segment.split("-")[1].split(".")[0]) + 1)
        if upgrade is not None:
            self._renew(upgrade)

    def _renew(self, upgrade: Callable[[State], dict[str, Tensor]]) -> None:
        """Put every state through ``upgrade``, as many at once as memory may hold."""
        for client in list(self._where):
            self._keep(client, upgrade(self._read(client)))
            self._dirty.add(client)
            if self._bytes > self._budget:
                self._spill()

    def prune(self) -> None:
        """Delete segments that hold no current state. Call after the new checkpoint is in place."""
        if self._folder is not None and self._folder.exists():
            live = set(self._where.values())
            for path in (*self._folder.glob("states-*.safetensors"), *self._folder.glob(".states-*.tmp")):
                if path.name not in live:
                    path.unlink(missing_ok=True)

    def _keep(self, client: int, state: State) -> None:
        self._hot[client] = dict(state)
        self._bytes += _size(state)

    def _drop(self, client: int) -> None:
        if client in self._hot:
            self._bytes -= _size(self._hot.pop(client))

    def _spill(self) -> None:
        """Write the dirty states, then forget the least recently used half of memory."""
        if self._dirty:
            self._write(sorted(self._dirty))
        while self._bytes > self._budget // 2 and self._hot:
            self._drop(next(iter(self._hot)))

    def _write(self, clients: list[int]) -> None:
        if self._folder is None:
            raise CheckpointError("client states cannot be written: the run has no folder")
        live = [c for c in self._where if c not in self._dirty]
        segments = set(self._where.values())
        if (
            len(segments) >= 8
        ):  # many old segments, mostly overwritten: fold what still counts into the new one
            clients = sorted({*clients, *live})
        name = f"states-{self._serial:06d}.safetensors"
        self._serial += 1
        tensors: dict[str, Tensor] = {}
        for c in clients:
            state = self._hot[c] if c in self._hot else self._read(c)
            tensors.update({f"{c}/{k}": v.contiguous() for k, v in state.items()})
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}.tmp"
        save_file(tensors, temporary, metadata={"clients": json.dumps(clients)})
        temporary.rename(self._folder / name)
        self._where.update(dict.fromkeys(clients, name))
        self._dirty.clear()

    def _sum(self, segment: str) -> str:
        assert self._folder is not None
        with (self._folder / segment).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    def _read(self, client: int) -> dict[str, Tensor]:
        assert self._folder is not None
        path, prefix = self._folder / self._where[client], f"{client}/"
        try:
            with safe_open(path, framework="pt") as f:
                return {k[len(prefix) :]: f.get_tensor(k) for k in f.keys() if k.startswith(prefix)}  # noqa: SIM118
        except Exception as e:
            raise CheckpointError(
                f"client states: {path} cannot be read ({e}); resume=never starts afresh"
            ) from e


def _size(state: State) -> int:
    return sum(t.numel() * t.element_size() for t in state.values()) + 64 * len(state)
