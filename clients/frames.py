"""Frames of rounds in which each client measured along directions of its own: who took part, and its codes.

As long as everybody registered took part, a frame is the clients' codes end to end, in their order, and no more. A log
with other rounds says for each who is in it: one bit per registered client, or where those are more than 1,024 their
number and their ids, four bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BITMAP = 1024  # registered clients up to which a bit each says who is in a frame


@dataclass(frozen=True)
class Heard:
    """One client's part of a frame: its packed codes, and its weight where they do not weigh the same (else 1)."""

    client: int
    codes: bytes
    weight: int = 1


@dataclass(frozen=True)
class Framing:
    """How parts become bytes: ``clients`` are registered, each sends ``size`` bytes of codes; ``weighed``: four more
    bytes say what it weighs."""

    clients: int
    size: int
    weighed: bool = False

    @property
    def each(self) -> int:
        """Bytes of a part."""
        return self.size + 4 * self.weighed

    def body(self, parts: Sequence[Heard]) -> bytes:
        """The parts end to end."""
        return b"".join(
            (np.array(p.weight, "<u4").tobytes() if self.weighed else b"") + p.codes for p in parts
        )

    def head(self, ids: Sequence[int]) -> bytes:
        """Who is in a frame."""
        if self.clients > BITMAP:
            return np.array([len(ids), *ids], "<u4").tobytes()
        bits = np.zeros(self.clients, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits).tobytes()

    def read_full(self, log: bytes) -> list[list[Heard]]:
        """The frames of a log in which everybody took part in every round.

        Raises:
            ValueError: if it is cut off.
        """
        frame = self.each * self.clients
        if len(log) % frame:
            raise ValueError(f"a log of {len(log)} bytes, expected a multiple of {frame}")
        everybody = range(self.clients)
        return [self._parts(log[at : at + frame], everybody) for at in range(0, len(log), frame)]

    def read(self, log: bytes) -> list[list[Heard]]:
        """The frames of a log that says who is in them.

        Raises:
            ValueError: if it is cut off.
        """
        out, at = [], 0
        while at < len(log):
            ids, at = self._ids(log, at)
            end = at + self.each * len(ids)
            if end > len(log):
                raise ValueError(f"a log of {len(log)} bytes ends within a frame")
            out.append(self._parts(log[at:end], ids))
            at = end
        return out

    def number(self, log: bytes) -> int:
        """How many frames ``read`` would give."""
        n = at = 0
        while at < len(log):
            ids, at = self._ids(log, at)
            n, at = n + 1, at + self.each * len(ids)
        return n

    def _ids(self, log: bytes, at: int) -> tuple[list[int], int]:
        if self.clients > BITMAP:
            n = int(np.frombuffer(log[at : at + 4], "<u4")[0])
            return np.frombuffer(log[at + 4 : at + 4 + 4 * n], "<u4").tolist(), at + 4 + 4 * n
        end = at + -(-self.clients // 8)
        bits = np.unpackbits(np.frombuffer(log[at:end], np.uint8))[: self.clients]
        return np.flatnonzero(bits).tolist(), end

    def _parts(self, body: bytes, ids: Sequence[int]) -> list[Heard]:
        return list(self._each(body, ids))

    def _each(self, body: bytes, ids: Sequence[int]) -> Iterator[Heard]:
        for i, client in enumerate(ids):
            part = body[i * self.each : (i + 1) * self.each]
            weight = int(np.frombuffer(part[:4], "<u4")[0]) if self.weighed else 1
            yield Heard(client, part[self.each - self.size :], weight)
