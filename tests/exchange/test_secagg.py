"""Fixed point, masks, shares and the four legs: golden arrays, integer sums, drop-outs, and what no client tells."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from itertools import permutations

import numpy as np
import pytest
from problems import GOLDEN

from fedsim.errors import ArgumentError, ClientError, EngineError
from fedsim.exchange.secagg import (
    PRG,
    FixedPoint,
    LegBytes,
    MaskingClient,
    TooFewSurvivors,
    UnmaskingServer,
    default_threshold,
    from_ring,
    join,
    key_stream,
    masked,
    neighbours,
    pair_key,
    read_ring_frame,
    residues_of,
    ring_frame,
    ring_levels,
    ring_sum,
    signed,
    split,
    to_levels,
    to_ring,
    unmasked,
)
from fedsim.exchange.secagg.masks import public_key
from fedsim.exchange.secagg.protocol import SEALED
from fedsim.exchange.secagg.shares import SHARE


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "release/ring.npz") as z:
        return dict(z)


def test_golden_levels_and_residues() -> None:
    z = golden()
    B, M, C = int(z["bits"]), int(z["most"]), float(z["C"])
    assert ring_levels(B, M) == z["L"] and C / ring_levels(B, M) == z["step"]
    for name, u in (("q", None), ("q_stochastic", z["u"])):
        found = [to_levels(x, C, int(z["L"]), None if u is None else u[i]) for i, x in enumerate(z["x"])]
        np.testing.assert_array_equal([f.q for f in found], z[name])
        assert [f.saturated for f in found] == z["saturated"].tolist()
    np.testing.assert_array_equal([to_ring(x, C, B, M) for x in z["x"]], z["residue"])
    np.testing.assert_array_equal(signed(z["residue"], B), z["q"])


def test_golden_masks_and_sum() -> None:
    z, B = golden(), int(golden()["bits"])
    for i in range(5):
        pairs = {j: z["pair_masks"][min(i, j), max(i, j)] for j in range(5) if j != i}
        y = masked(i, z["residue"][i], z["own_masks"][i], pairs, B)
        np.testing.assert_array_equal(y, z["masked"][i])
        assert ring_frame(y, B) == z["frames"][i].tobytes()
        np.testing.assert_array_equal(read_ring_frame(z["frames"][i].tobytes(), 16, B), y)
    alive = np.flatnonzero(z["alive"]).tolist()
    broken = {
        (i, j): z["pair_masks"][min(i, j), max(i, j)] for i in alive for j in range(5) if j not in alive
    }
    whole = ring_sum(z["masked"][alive], B)
    found = unmasked(whole, {i: z["own_masks"][i] for i in alive}, broken, B)
    np.testing.assert_array_equal(found, z["unmasked"])
    np.testing.assert_allclose(from_ring(found, z["C"], B, int(z["most"])), z["total"], atol=1e-12)
    stream = key_stream(z["chacha_key"].tobytes(), 256)
    assert stream == z["chacha_stream"].tobytes() and not z["chacha_nonce"].any()


@pytest.mark.parametrize("B", [8, 16, 20, 32, 62])
def test_sums_hang_on_no_order_and_cannot_wrap(B: int) -> None:
    rng, M = np.random.default_rng(B), 5
    x = rng.uniform(-2, 2, (M, 9))  # beyond the reach: saturates
    parts = [to_ring(v, 1.0, B, M) for v in x]
    sums = {ring_sum(order, B).tobytes() for order in list(permutations(parts))[::17]}
    assert len(sums) == 1
    plain = np.sum([to_levels(v, 1.0, ring_levels(B, M)).q for v in x], axis=0)
    np.testing.assert_array_equal(signed(ring_sum(parts, B), B), plain)
    ends = [to_ring(np.array([1.0, -1.0]), 1.0, B, M)] * M
    np.testing.assert_allclose(from_ring(ring_sum(ends, B), 1.0, B, M), [M, -M], rtol=1e-12)


def test_more_clients_than_the_ring_was_made_for_and_rings_without_levels() -> None:
    ring = FixedPoint(32, 10)
    ring.check_cohort(10)
    with pytest.raises(EngineError, match="11 clients"):
        ring.check_cohort(11)
    with pytest.raises(ArgumentError, match="at least 9"):
        ring_levels(8, 200)
    assert ring_levels(9, 200) == 1
    with pytest.raises(ArgumentError, match=r"8\.\.62"):
        ring_levels(63, 2)
    with pytest.raises(ArgumentError, match="nearest"):
        FixedPoint(32, 10, "up")
    for frame in (ring_frame([1, 2], 32)[:-1], ring_frame([1, 2, 3], 32), ring_frame([1, 2], 24)):
        with pytest.raises(ClientError, match="expected 2 residues of 32"):
            read_ring_frame(frame, 2, 32)


def test_saturation_is_counted_and_rounding_is_to_even_or_unbiased() -> None:
    assert to_levels([3.0, -3.0, 0.5, 1.5, 2.5], 2.0, 2) == (pytest.approx([2, -2, 0, 2, 2]), 2)
    u = np.random.default_rng(0).random(20000)
    assert to_levels(np.full(20000, 0.3), 1.0, 1, u).q.mean() == pytest.approx(0.3, abs=0.015)
    assert signed(residues_of([-1, 5], 8), 8).tolist() == [-1, 5]


def test_streams_are_words_of_whole_bytes_low_bits() -> None:
    key = bytes(range(32))
    words = np.frombuffer(key_stream(key, 30), np.uint8).reshape(10, 3).astype(int)
    expected = [(a | b << 8 | c << 16) % (1 << 20) for a, b, c in words]
    assert PRG(key, 10, 20).tolist() == expected
    assert len(set(PRG(key, 4096, 8).tolist())) == 256  # the top residue too


def test_shares_are_flowers() -> None:
    secret = bytes(range(32))
    shares = split(secret, 3, 5)
    assert {len(s) for s in shares} == {SHARE} == {52}
    shamir = pytest.importorskip("flwr.common.secure_aggregation.crypto.shamir")
    assert join(shares[1:4]) == secret == join(shares) == shamir.combine_shares(shares[2:])
    assert join(shamir.create_shares(secret, 3, 5)[:3]) == secret
    assert join(shares[:2]) is None and join([shares[0]] * 3) is None and join([]) is None
    assert join(split(secret, 1, 2)[:1]) == secret
    with pytest.raises(ArgumentError, match="6 of 5"):
        split(secret, 6, 5)


def keyed(client: int) -> Callable[[int], bytes]:
    """Secrets that repeat, for tests alone."""
    count = iter(range(10**6))
    return lambda n: sha256(f"{client}/{next(count)}".encode()).digest()[:n]


class Cohort:
    """A whole protocol in one place: who is lost before which leg."""

    def __init__(self, n: int, t: int, k: int | None = None, B: int = 24):
        self.n, self.t, self.B = n, t, B
        self.x = np.random.default_rng(n).normal(size=(n, 7))
        self.residues = [to_ring(v, 4.0, B, n) for v in self.x]
        near = neighbours(range(n), k, 3, 0)
        self.server = UnmaskingServer(0, "run", t, near)
        self.clients = {i: MaskingClient.fresh(i, 0, "run", t, keyed(i)) for i in range(n)}

    def run(
        self,
        before_shares: tuple[int, ...] = (),
        before_masked: tuple[int, ...] = (),
        late: tuple[int, ...] = (),
    ):
        server = self.server
        for i, c in self.clients.items():
            server.public[i] = c.keys()
        for i, c in self.clients.items():
            if i not in before_shares:
                server.sealed[i] = c.shares(server.keys_for(i), keyed(100 + i))
        for i in server.sealed:
            if i not in before_masked:
                y = self.clients[i].masked(self.residues[i], server.shares_for(i), self.B)
                server.masked[i] = y
        server.check_enough(len(server.masked))
        revealed = {i: self.clients[i].unmask(server.masked) for i in server.masked if i not in late}
        return server.total(revealed, self.B)


LOST = (((), (), ()), ((), (2, 5), ()), ((0,), (3,), ()), ((), (), (1, 6)), ((4,), (), (5,)))


@pytest.mark.parametrize(
    ("k", "before_shares", "before_masked", "late"),
    [*((None, *lost) for lost in LOST), (4, (), (), ()), (4, (), (2,), ()), (4, (), (), (6,))],
)
def test_the_masked_sum_is_the_survivors_plain_sum(
    k: int | None, before_shares: tuple[int, ...], before_masked: tuple[int, ...], late: tuple[int, ...]
) -> None:
    """Bit for bit, with up to n - t drop-outs at each leg; who is late after the masked leg counts."""
    cohort = Cohort(7, 5 if k is None else 3, k)
    found = cohort.run(before_shares, before_masked, late)
    alive = [i for i in range(7) if i not in before_shares + before_masked]
    np.testing.assert_array_equal(found, ring_sum([cohort.residues[i] for i in alive], cohort.B))


def test_masks_hide_what_is_sent() -> None:
    cohort = Cohort(5, 4)
    cohort.run()
    for i, y in cohort.server.masked.items():
        assert (y != cohort.residues[i]).all()
        own = PRG(cohort.clients[i].seed, 7, cohort.B)
        assert (
            y - own & np.uint64((1 << cohort.B) - 1) != cohort.residues[i]
        ).all()  # pair masks are there too


def test_fewer_than_t_survivors_make_the_round_void() -> None:
    with pytest.raises(TooFewSurvivors, match="4 clients came; secure aggregation needs 5"):
        Cohort(7, 5).run(before_masked=(0, 1, 2))
    with pytest.raises(TooFewSurvivors, match="4 shares of client 0's secret; 5 are needed"):
        Cohort(7, 5).run(late=(0, 1, 2))


def test_a_client_never_gives_both_secrets_of_another() -> None:
    cohort = Cohort(5, 4)
    cohort.run()
    client = cohort.clients[0]
    with pytest.raises(ClientError, match="second time"):
        client.unmask({0, 1, 2, 3})
    client.answered = False
    with pytest.raises(ClientError, match="3 survivors"):
        client.unmask({0, 1, 2})
    with pytest.raises(ClientError, match="survivors"):
        client.unmask({1, 2, 3, 4})  # it is not among them itself
    with pytest.raises(ClientError, match="threshold is 4"):
        cohort.clients[1].shares({0: cohort.clients[0].keys()})
    with pytest.raises(ClientError, match="one pair of keys"):
        cohort.clients[1].shares({j: cohort.clients[0].keys() for j in (0, 2, 3)})


def test_both_sides_of_a_pair_have_one_key_and_each_round_another() -> None:
    a, b = bytes(range(32)), bytes(range(32, 64))
    key = pair_key(a, public_key(b), "run", 3, "ring")
    assert key == pair_key(b, public_key(a), "run", 3, "ring") and len(key) == 32
    assert key not in (
        pair_key(a, public_key(b), "run", 4, "ring"),
        pair_key(a, public_key(b), "other", 3, "ring"),
        pair_key(a, public_key(b), "run", 3, "other"),
    )


def test_graphs_of_neighbours() -> None:
    near = neighbours(range(3, 23), 6, 1, 5)
    assert all(len(set(of)) == 6 and i not in of for i, of in near.items())
    assert all(i in near[j] for i, of in near.items() for j in of)
    assert near != neighbours(range(3, 23), 6, 1, 6) and near == neighbours(range(3, 23), 6, 1, 5)
    assert neighbours([4, 9, 2], 6, 1, 0) == {2: (4, 9), 4: (2, 9), 9: (2, 4)}
    with pytest.raises(ArgumentError, match="even"):
        neighbours(range(9), 3, 1, 0)
    assert [default_threshold(n) for n in (1, 2, 3, 10)] == [1, 2, 2, 7]


def test_priced_bytes() -> None:
    """A share takes 52 bytes, those for one neighbour 124 and 152 encrypted."""
    legs = LegBytes.of(k=9, n=10, frame=1000, message=5000)
    assert SEALED == 152
    assert (legs.up, legs.down) == (64 + 152 * 9 + 1000 + 52 * 10, 64 * 9 + 152 * 9 + 5000 + 80)
    a, b = (MaskingClient.fresh(i, 0, "run", 1) for i in range(2))
    assert [len(s) for s in a.shares({1: b.keys()}).values()] == [152]
