"""Secure aggregation in four legs (Bonawitz et al. 2017; with neighbours, Bell et al. 2020): a client's half and the
server's. The server is taken to follow the protocol: one that hands out keys of its own can read single vectors.

1. keys: each client makes two key pairs, one for masks and one to encrypt shares, and a seed of its own mask.
2. shares: it sends each neighbour, encrypted, a share of its mask key and of its seed.
3. masked: it sends its residues with its own mask and those it has in common with neighbours who came that far.
4. unmask: it is told who delivered, and gives shares of their seeds and of the mask keys of those who did not.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from fedsim.errors import ArgumentError, ClientError
from fedsim.exchange.secagg.masks import (
    PRG,
    SECRET,
    agreed,
    is_public_key,
    masked,
    pair_key,
    public_key,
    seal,
    unmasked,
    unseal,
)
from fedsim.exchange.secagg.ring import Residues, ring_sum
from fedsim.exchange.secagg.shares import SHARE, join, split
from fedsim.rng import numpy_rng

ABOUT = struct.Struct("<qqi")  # sender, receiver and round of shares
KEYS = 2 * SECRET  # bytes of a client's two public keys
SEALED = ABOUT.size + 2 * SHARE + 28  # bytes of the shares for one neighbour, encrypted
VECTOR = "ring"  # all vectors of an exchange lie end to end in one


class TooFewSurvivors(Exception):  # noqa: N818 - what became of a round, not an error
    """Fewer than t clients delivered, or gave shares: the round is void."""


def default_threshold(n: int) -> int:
    """t = ceil(2n/3) of n clients, but more than half of them."""
    return max(math.ceil(2 * n / 3), n // 2 + 1)


def check_threshold(t: int, n: int) -> None:
    """Refuse a threshold that two disjoint halves could both reach, or that nobody can.

    Raises:
        ArgumentError: unless n/2 < t <= n.
    """
    if not n / 2 < t <= n:
        raise ArgumentError(f"secagg.threshold={t}: must be above half of {n} clients and at most {n}")


def neighbours(clients: Sequence[int], k: int | None, seed: int, round: int) -> dict[int, tuple[int, ...]]:
    """Who masks with whom, ascending: all, or a random k-regular graph (k even) on the cohort's ring."""
    ids = sorted(clients)
    if k is None or k >= len(ids) - 1:
        return {i: tuple(j for j in ids if j != i) for i in ids}
    if k < 2 or k % 2:
        raise ArgumentError(f"secagg.neighbours={k}: must be even and at least 2, or null for all")
    order = [ids[int(at)] for at in numpy_rng(seed, "secagg/neighbours", round).permutation(len(ids))]
    steps = [s for s in range(-k // 2, k // 2 + 1) if s]
    return {i: tuple(sorted(order[(at + s) % len(ids)] for s in steps)) for at, i in enumerate(order)}


def unfit(keys: Mapping[int, bytes]) -> dict[int, str]:
    """Why keys of leg 1 cannot be handed out, by client: neighbours would end at them, or agree on what others know."""
    out, common = dict[int, str](), Counter(keys.values())
    for i, both in keys.items():
        if len(both) != KEYS or not all(is_public_key(both[at : at + SECRET]) for at in (0, SECRET)):
            out[i] = "its keys are none that anybody can agree by"
        elif common[both] > 1:
            out[i] = "another client has the same keys"
    return out


@dataclass
class MaskingClient:
    """One client in one round. All that it must remember between legs is in its fields, numbers and bytes."""

    client: int
    round: int
    run: str  # id that salts the keys
    t: int
    mask_key: bytes  # private
    share_key: bytes  # private
    seed: bytes  # of its own mask
    public: dict[int, bytes] = field(default_factory=dict)  # keys of neighbours
    sealed: dict[int, bytes] = field(default_factory=dict)  # shares from neighbours who completed leg 2
    own: tuple[bytes, bytes] = (b"", b"")  # its own shares of its mask key and seed
    answered: bool = False  # leg 4, which it does once

    @staticmethod
    def fresh(
        client: int, round: int, run: str, t: int, random: Callable[[int], bytes] = secrets.token_bytes
    ) -> MaskingClient:
        """Leg 1: new secrets."""
        return MaskingClient(client, round, run, t, random(SECRET), random(SECRET), random(SECRET))

    def keys(self) -> bytes:
        """What leg 1 sends: the public keys of masks and of shares, 64 bytes."""
        return public_key(self.mask_key) + public_key(self.share_key)

    def shares(
        self, public: Mapping[int, bytes], random: Callable[[int], bytes] = secrets.token_bytes
    ) -> dict[int, bytes]:
        """Leg 2: encrypted shares by neighbour, ``SEALED`` bytes each; ``public`` are the neighbours' keys.

        Raises:
            ClientError: if they are too few for the threshold, none that can be used, or two have the same.
        """
        self.public = {j: bytes(p) for j, p in sorted(public.items()) if j != self.client}
        held = {**self.public, self.client: self.keys()}
        if unfit(held):
            raise ClientError("the keys that the server handed out are not one pair of keys a client")
        if len(held) < self.t:
            raise ClientError(f"the server named {len(held)} clients; the threshold is {self.t}")
        both = [split(s, self.t, len(held)) for s in (self.mask_key, self.seed)]
        self.own = both[0][-1], both[1][-1]
        return {
            j: seal(self._share_key(j), ABOUT.pack(self.client, j, self.round) + a + b, random)
            for j, a, b in zip(self.public, *both, strict=False)
        }

    def masked(self, residues: ArrayLike, sealed: Mapping[int, bytes], B: int) -> Residues:
        """Leg 3: y_i, masked with those neighbours whose shares came.

        Raises:
            ClientError: if they are too few for the threshold, or none of the neighbours.
        """
        self.sealed = {j: bytes(s) for j, s in sorted(sealed.items()) if j != self.client}
        if not self.sealed.keys() <= self.public.keys() or len(self.sealed) + 1 < self.t:
            raise ClientError(f"shares came from {len(self.sealed)} neighbours; the threshold is {self.t}")
        d = len(np.asarray(residues))
        pairs = {
            j: PRG(pair_key(self.mask_key, self.public[j][:SECRET], self.run, self.round, VECTOR), d, B)
            for j in self.sealed
        }
        return masked(self.client, residues, PRG(self.seed, d, B), pairs, B)

    def unmask(self, survivors: Iterable[int]) -> dict[int, bytes]:
        """Leg 4: a share for each client of leg 3: of the seed of survivors, of the mask key of those dropped.

        Never both of one client, and only once.

        Raises:
            ClientError: if it was asked before, or the survivors are fewer than the threshold or do not name itself.
        """
        there = set(survivors)
        known = {*self.sealed, self.client}
        if self.answered:
            raise ClientError("the server asks a second time for shares of one round")
        if self.client not in there or len(there & known) < self.t:
            raise ClientError(
                f"the server names {len(there & known)} survivors that this client knows; the threshold is {self.t}"
            )
        self.answered = True
        out = {self.client: self.own[1]}
        for j, sealed in self.sealed.items():
            plain = unseal(self._share_key(j), sealed)
            if plain is None or ABOUT.unpack_from(plain) != (j, self.client, self.round):
                continue  # what j sent is no share: the others' do
            mask, seed = plain[ABOUT.size : ABOUT.size + SHARE], plain[ABOUT.size + SHARE :]
            out[j] = seed if j in there else mask
        return out

    def _share_key(self, j: int) -> bytes:
        return agreed(self.share_key, self.public[j][SECRET:], self.run, f"fedsim/shares/{self.round}")


@dataclass
class UnmaskingServer:
    """The server in one round: what it was sent, and the sum that it may learn."""

    round: int
    run: str
    t: int
    near: Mapping[int, Sequence[int]]  # who masks with whom
    public: dict[int, bytes] = field(default_factory=dict)  # leg 1, by client
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)  # leg 2, by sender and receiver
    masked: dict[int, Residues] = field(default_factory=dict)  # leg 3: who is in it survived

    def keys_for(self, i: int) -> dict[int, bytes]:
        """Keys of the neighbours of ``i`` that sent theirs."""
        return {j: self.public[j] for j in self.near[i] if j in self.public}

    def shares_for(self, i: int) -> dict[int, bytes]:
        """Shares for ``i`` of neighbours that sent theirs."""
        return {j: self.sealed[j][i] for j in self.near[i] if i in self.sealed.get(j, ())}

    def check_enough(self, count: int) -> None:
        """Raise ``TooFewSurvivors`` where ``count`` clients came so far."""
        if count < self.t:
            raise TooFewSurvivors(f"{count} clients came; secure aggregation needs {self.t}")

    def total(self, revealed: Mapping[int, Mapping[int, bytes]], B: int) -> Residues:
        """The survivors' sum, from shares by who revealed them and whose they are.

        Raises:
            TooFewSurvivors: if the survivors, or the shares of one secret, are fewer than t.
        """
        d = len(next(iter(self.masked.values()), ()))
        return ring_sum([*self.masked.values(), self.correction(self.masked, revealed, d, B)], B)

    def correction(
        self, survivors: Collection[int], revealed: Mapping[int, Mapping[int, bytes]], d: int, B: int
    ) -> Residues:
        """What takes the masks off the sum of the survivors' residues (d,), added to it; raises as ``total``."""
        self.check_enough(len(survivors))
        own = {i: PRG(self._joined(i, revealed), d, B) for i in survivors}
        broken: dict[tuple[int, int], Residues] = {}
        for j in self.sealed:
            partners = [i for i in self.near[j] if i in survivors]
            if j in survivors or not partners:
                continue
            key = self._joined(j, revealed, self.public[j][:SECRET])
            for i in partners:
                s = pair_key(key, self.public[i][:SECRET], self.run, self.round, VECTOR)
                broken[i, j] = PRG(s, d, B)
        return unmasked(np.zeros(d, np.uint64), own, broken, B)

    def _joined(self, i: int, revealed: Mapping[int, Mapping[int, bytes]], public: bytes = b"") -> bytes:
        """The secret, of any t shares that lie together: who sent a wrong one spoils none. ``public``: what it is to
        be the private half of, if that is known."""
        shares = [found[i] for j, found in sorted(revealed.items()) if i in found]
        if len(shares) < self.t:
            raise TooFewSurvivors(f"{len(shares)} shares of client {i}'s secret; {self.t} are needed")
        for at in range(len(shares)):
            secret = join([*shares[at:], *shares[:at]][: self.t])
            if secret is not None and public in (b"", public_key(secret)):
                return secret
        raise TooFewSurvivors(f"the shares of client {i}'s secret do not give it back")


@dataclass(frozen=True)
class LegBytes:
    """Bytes of one client in all four legs, with k neighbours in a cohort of n: what the virtual clock prices."""

    up: int
    down: int
    trips: int = 1  # round trips of an exchange

    @staticmethod
    def of(k: int, n: int, frame: int, message: int) -> LegBytes:
        """Keys, shares, the masked frame, shares revealed; keys and shares of neighbours, the message, survivors."""
        up, down = KEYS + SEALED * k + frame + SHARE * (k + 1), (KEYS + SEALED) * k + message + 8 * n
        return LegBytes(up, down, trips=4)
