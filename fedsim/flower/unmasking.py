"""The server's half of secure aggregation over the grid: legs before and after the exchange that brings updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.assignments import Broadcast, Chunk, ChunkResult
from fedsim.exchange.entries import shaped, slots_of, spread
from fedsim.exchange.payload import Payload
from fedsim.exchange.release import Release
from fedsim.exchange.secagg import TooFewSurvivors, UnmaskingServer, neighbours, signed, unfit
from fedsim.exchange.secagg.ring import residues_of, ring_sum
from fedsim.exchange.summing import SecureSums
from fedsim.flower.answers import NodeAnswer, absent, failed
from fedsim.flower.masking import LEAST, LEGS, OTHERS, OWN, PUBLIC, SHARES, SURVIVORS, by_client, rows
from fedsim.task.layout import Layout

Ask = Callable[[Broadcast, Mapping[int, Chunk]], Mapping[int, NodeAnswer]]
KEYS, SEAL, UNMASK = LEGS


class MaskedExchange:
    """One exchange of ``clients``. ``ask`` carries out a leg: what was asked, to the answers by client."""

    def __init__(
        self, release: Release, broadcast: Broadcast, clients: Sequence[int], run: str, seed: int, ask: Ask
    ):
        secure = cast(SecureSums, release.secure)  # there is one: see ``masks``
        self._release, self._secure, self._broadcast, self._ask = release, secure, broadcast, ask
        self._seed = seed
        near = neighbours(clients, secure.neighbours, seed, broadcast.round)
        self._server = UnmaskingServer(broadcast.round, run, secure.enough(len(clients)), near)
        self.lost: dict[int, NodeAnswer] = {}  # who did not come as far as the update
        self._legs(clients)

    def _legs(self, clients: Sequence[int]) -> None:
        """Keys and shares."""
        server = self._server
        for c, answer in self._leg(KEYS, {c: self._said([c]) for c in clients}).items():
            server.public[c] = answer["keys"].numpy().tobytes()
        for c, why in unfit(server.public).items():
            del server.public[c]
            self.lost[c] = failed(absent(c, "failed", ""), f"its reply is not taken: {why}")
        asked = {}
        for c in server.public:
            public = server.keys_for(c)
            said = self._said(public, {PUBLIC: rows(list(public.values()), LEGS[KEYS][1])})
            asked[c] = Payload(said.arrays, {LEAST: server.t})
        for c, answer in self._leg(SEAL, asked).items():
            server.sealed[c] = by_client(asked[c].arrays[OTHERS], answer["shares"])

    def part(self, client: int, own: Payload | None) -> Payload:
        """What ``client`` receives for its update: ``own`` and the shares of its neighbours."""
        shares = self._server.shares_for(client)
        said = self._said(shares, {SHARES: rows(list(shares.values()), LEGS[SEAL][1])})
        return said if own is None else own.joined(said)

    def unmask(self, results: Sequence[ChunkResult], layout: Layout) -> str:
        """Take the masks off the sums of all chunks, in the last of them; or why that cannot be."""
        survivors = [o.client for r in results for o in r.outcomes if o.kind == "ok"]
        server, sums = self._server, next((r.folder.sums for r in reversed(results) if r.folder.sums), None)
        if sums is None or len(survivors) < server.t:
            return ""  # void, as in a simulation
        asked = {}
        for c in survivors:
            known = sorted({c, *server.shares_for(c)})
            asked[c] = self._said(known, {SURVIVORS: torch.tensor(survivors)})
        revealed: dict[int, dict[int, bytes]] = {}
        for c, answer in self._leg(UNMASK, asked).items():
            found = by_client(asked[c].arrays[OTHERS], answer["revealed"])
            revealed[c] = {j: share for j, share in found.items() if any(share)}
        names = self._release.summed(self._broadcast.fold, self._broadcast.task)
        places = [(name, slots_of(sums[name, "sum"], layout)) for name in names]
        whole = [sums[n, "sum"].numel() if slots is None else slots.size for n, slots in places]
        about = (self._seed, self._broadcast.task, self._broadcast.round)
        spans = [self._release.places(n, d, *about) for (n, _), d in zip(places, whole, strict=True)]
        sizes = [d if span is None else len(span) for d, span in zip(whole, spans, strict=True)]
        try:
            off = server.correction(survivors, revealed, sum(sizes), self._secure.bits)
        except TooFewSurvivors as why:
            return f"secure aggregation is void: {why}"
        levels = torch.from_numpy(np.ascontiguousarray(signed(off, self._secure.bits)))
        ends = np.cumsum(sizes).tolist()
        for (name, slots), d, span, size, end in zip(places, whole, spans, sizes, ends, strict=True):
            total, part = sums[name, "sum"], spread(levels[end - size : end], span, d)
            sums[name, "sum"] = total + shaped(part, slots, total)
        return self._spoilt(names, [r.folder.sums for r in results if r.folder.sums], len(survivors))

    def _spoilt(
        self, names: Sequence[str], chunks: Sequence[Mapping[tuple[str, str], Tensor]], count: int
    ) -> str:
        """Why the sums over all chunks cannot be those of ``count`` clients, where that shows: single vectors, nobody
        can see."""
        bits, most = self._secure.bits, count * self._secure.ring.L
        for name in names:
            parts = [residues_of(sums[name, "sum"].numpy(), bits) for sums in chunks]
            levels = signed(ring_sum(parts, bits), bits)
            if bool((np.abs(levels) > most).any()):
                return (
                    f"secure aggregation is void: the sum of '{name}' is none that {count} clients can have: one of "
                    "them masked otherwise than its shares say"
                )
        return ""

    def _leg(self, task: str, asked: Mapping[int, Payload]) -> dict[int, Mapping[str, Tensor]]:
        """Arrays of those who completed a leg; the others are lost to the exchange."""
        broadcast = Broadcast(self._broadcast.round, task, Payload(), {LEGS[task][0]: ("stack",)})
        place = {c: Chunk([c], {c: said}) for c, said in asked.items()}
        found: dict[int, Mapping[str, Tensor]] = {}
        for c, answer in self._ask(broadcast, place).items():
            if answer.outcome.kind == "ok":
                found[c] = answer.arrays
            elif task != UNMASK:
                why = answer.outcome.reason or answer.outcome.kind
                self.lost[c] = absent(c, "dropped", f"it did not complete {task.removeprefix(OWN)}: {why}")
        return found

    @staticmethod
    def _said(clients: Iterable[int], arrays: Mapping[str, Tensor] | None = None) -> Payload:
        return Payload({OTHERS: torch.tensor([*clients], dtype=torch.int64), **(arrays or {})})
