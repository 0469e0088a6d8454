"""Codecs, directions and slopes against plain NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import classification, method, network
from torch import nn

from clients.codec import CODECS, log8_decode, log8_encode, ref9_decode, ref9_encode, saturated
from clients.directions import Directions, generator
from clients.frames import BITMAP, Framing, Heard
from fedsim.config.schema import ClientConfig
from fedsim.errors import ClientError, ConfigError
from fedsim.exchange.payload import Payload
from fedsim.server.traits import ClientQuestion
from fedsim.task.layout import Layout
from strategies.fedkseed import probabilities
from strategies.one_byte import decode, direction, encode, nu, slope, update

# -- codec ------------------------------------------------------------------------------------------------------------


def test_the_table_of_one_byte_is_exact() -> None:
    expected = [0.0] + [math.exp((k - 64) / 8) for k in range(1, 128)]
    table = decode(np.arange(256, dtype=np.uint8))
    np.testing.assert_allclose(table, expected + [-v for v in expected], rtol=1e-15)
    assert table[0] == table[128] == 0
    np.testing.assert_array_equal(encode(table), [0, *range(1, 128), 0, *range(129, 256)])


@pytest.mark.parametrize(("codec", "steps", "top"), [("log8", 8, 128), ("ref9", 16, 256)])
def test_slopes_are_rounded_in_the_logarithm(codec: str, steps: int, top: int) -> None:
    g = np.random.default_rng(0).normal(size=500) * 10.0 ** np.random.default_rng(1).uniform(-3, 3, 500)
    codes, values = encode(g, codec), decode(encode(g, codec), codec)
    assert codes.min() >= 0 and codes.max() < 2 * top
    for one, code, value in zip(g, codes.tolist(), values.tolist(), strict=True):
        low, half = (1, 127) if codec == "log8" else (1, 255), top // 2
        k = min(max(round(steps * math.log(abs(one))) + half, low[0]), low[1])
        assert code == k + top * (one < 0)
        assert value == pytest.approx(math.copysign(math.exp((k - half) / steps), one), rel=1e-14)
    inside = (np.abs(g) > 4e-4) & (np.abs(g) < 2500)
    bound = math.exp(1 / (2 * steps)) - 1  # 6.45 % and 3.2 %
    assert np.abs(values / g - 1)[inside].max() <= bound + 1e-12


@pytest.mark.parametrize("codec", list(CODECS))
def test_what_is_not_finite_is_zero_and_bytes_come_back(codec: str) -> None:
    strange = [0.0, np.nan, np.inf, -np.inf]
    assert decode(encode(strange, codec), codec).tolist() == [0] * 4
    one = CODECS[codec]
    codes = encode(np.random.default_rng(0).normal(size=13) * 50, codec)
    codes[5] = one.absent
    data = one.pack(codes)
    assert len(data) == one.nbytes(13) == {"log8": 13, "ref9": 15, "float32": 52, "float64": 104}[codec]
    np.testing.assert_array_equal(one.unpack(data, 13), codes)
    assert np.flatnonzero(one.is_absent(codes)).tolist() == [5] and decode(codes, codec)[5] == 0
    with pytest.raises(ValueError, match="expected"):
        one.unpack(data[:-1], 13)


def test_slopes_below_the_range_are_rounded_up_and_counted() -> None:
    codes = log8_encode([1e-9, -1e-9, 1e9, 1.0])
    assert codes.tolist() == [1, 129, 127, 64]
    assert saturated("log8", codes) == 0.5
    assert log8_decode(codes)[0] == pytest.approx(3.8e-4, rel=0.01)
    assert ref9_decode(ref9_encode([1.0, -1.0])).tolist() == [1, -1]


# -- directions -------------------------------------------------------------------------------------------------------


def test_tensor_by_tensor_gives_the_numbers_of_one_draw_and_padding_is_passed_over() -> None:
    layout = Layout(network())
    z = Directions(3, "own", layout.params).draw(5, 2, 1, torch.zeros(layout.dim))
    assert layout.params.padded and layout.params.holds(z)
    np.testing.assert_array_equal(layout.compact(z).numpy(), direction(3, 5, 2, 1, layout.size))
    double = Directions(3, "own", layout.params).draw(5, 2, 1, torch.zeros(layout.dim, dtype=torch.float64))
    assert torch.equal(double, z.double())
    again = Directions(3, "own", layout.params).draw(5, 2, 1, z, torch.full_like(z, 9.0))
    assert torch.equal(again, z)
    sphere = Directions(3, "own", layout.params).sphere(5, 2, 1, z)
    assert float(sphere.norm()) == pytest.approx(1, rel=1e-6)


def test_no_two_directions_share_a_block_of_the_counter() -> None:
    """The names are the upper words of the counter, so that what is drawn under one never reaches the next."""

    def block(t: int, a: int, b: int, seed: int = 0, scope: str = "own") -> tuple[int, ...]:
        state = generator(seed, scope, t, a, b).bit_generator.state["state"]
        return (*map(int, state["key"]), *map(int, state["counter"]))

    names = [(t, 0, b) for t in (0, 1, 16, 17, 99_999) for b in range(64)] + [(1, 10, 0), (10, 1, 0)]
    found = {block(*name) for name in names}
    assert len(found) == len(names)
    assert {state[2] for state in found} == {0}  # 2**64 blocks are free below each
    assert len({block(0, 0, 0, seed, scope) for seed in (0, 1) for scope in ("own", "shared", "pool")}) == 6
    z = [
        direction(0, t, 0, j, 1000) for t, j in ((17, 0), (16, 1))
    ]  # one seed in the authors' code of DeComFL
    assert abs(float(np.corrcoef(z[0], z[1])[0, 1])) < 0.15
    assert float(np.std(z[0])) == pytest.approx(1, abs=0.1)


# -- equations --------------------------------------------------------------------------------------------------------


def test_slope_and_update_are_the_equations() -> None:
    rng = np.random.default_rng(0)
    A, theta = rng.normal(size=(6, 6)), rng.normal(size=6)
    A = A @ A.T
    z = rng.normal(size=(5, 6))
    value = lambda v: float(0.5 * v @ torch.tensor(A) @ v)  # noqa: E731
    c = [slope(value, torch.tensor(theta), torch.tensor(one), 1e-3) for one in z]
    np.testing.assert_allclose(c, z @ A @ theta, rtol=1e-9)  # of a quadratic, the exact slope
    for kind, K in (("mean", 5), ("sqrt", 5**0.5)):
        terms = ((float(decode(encode(one))), torch.tensor(v)) for one, v in zip(c, z, strict=True))
        new = update(torch.tensor(theta), terms, 0.1 / nu(5, kind))
        expected = theta - 0.1 / K * decode(encode(c)) @ z
        np.testing.assert_allclose(new, expected, atol=1e-12)
    assert slope(lambda v: float("nan"), torch.zeros(1), torch.ones(1), 1.0) == 0
    assert torch.equal(update(torch.ones(2), [], 1.0), torch.ones(2))


@pytest.mark.parametrize("clients", [5, BITMAP + 1])
@pytest.mark.parametrize("weighed", [False, True])
def test_frames_say_who_took_part(clients: int, weighed: bool) -> None:
    framing = Framing(clients, 3, weighed)
    rounds = [
        [Heard(c, bytes([c, 1, 2]), 10 * c + 1 if weighed else 1) for c in ids] for ids in ([0, 3], [], [1])
    ]
    log = b"".join(framing.head([p.client for p in parts]) + framing.body(parts) for parts in rounds)
    assert framing.read(log) == rounds and framing.number(log) == 3
    heads = 3 * 1 if clients == 5 else 4 * (3 + 3)
    assert len(log) == heads + 3 * (3 + 4 * weighed)
    full = [[Heard(c, bytes([c % 250, t, 0]), 2 if weighed else 1) for c in range(clients)] for t in range(2)]
    body = b"".join(map(framing.body, full))
    assert len(body) == 2 * clients * (3 + 4 * weighed) and framing.read_full(body) == full
    for broken in (lambda: framing.read(log[:-1]), lambda: framing.read_full(body[:-1])):
        with pytest.raises(ValueError, match="a log of"):
            broken()


def test_probabilities_of_the_pool_by_hand() -> None:
    histories = [
        [0, -4.0, 5.0],
        [0.0],
        [0, 1.0, 2.0, 1.0],
    ]  # each begins at 0: means 3, 0, 1, scaled to 1, 0, 1/3
    sums, uses = [sum(map(abs, h)) for h in histories], [len(h) - 1 for h in histories]
    means = np.array([np.mean(np.abs(h)) for h in histories])
    p, e = probabilities(sums, uses), np.exp(means / 3)
    np.testing.assert_allclose(p, e / e.sum(), rtol=1e-14)
    np.testing.assert_allclose(probabilities([0, 0], [0, 0]), [0.5, 0.5])


# -- what cannot be ---------------------------------------------------------------------------------------------------


class Stubborn(nn.BatchNorm1d):
    """Uses its batch whatever it is told."""

    def train(self, mode: bool = True) -> Stubborn:
        return super().train(True)


def test_batch_norm_that_stays_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Stubborn(5), nn.Linear(5, 3))
    with pytest.raises(ClientError, match="BatchNorm '1' stays in training mode"):
        classification(model=model).run("strategy=one_byte", "strategy.lr=0.1", "rounds=1")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("strategy=one_byte",), "strategy.lr=null: must be"),
        (("strategy=one_byte", "strategy.lr=0.1", "strategy.codec=log7"), "strategy.codec=log7: choose one of"),
        (("strategy=one_byte", "strategy.lr=0.1", "aggregator=flag"), "aggregator: slopes of One Byte"),
        (("strategy=one_byte", "strategy.lr=0.1", "attack=sign_flip"), "attack: this one changes vectors"),
        (("strategy=fedkseed", "strategy.lr=0.1", "client.lr_decay=0.9"), "client.lr_decay=0.9: FedKSeed adds up"),
        (("strategy=fedkseed", "strategy.lr=0.1", "strategy.pool=70000"), "strategy.pool=70000"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(settings: tuple[str, ...], words: str) -> None:
    fraction = ("attack.fraction=0.34",) if any(s.startswith("attack=") for s in settings) else ()
    with pytest.raises(ConfigError, match=words):
        classification().run(*settings, *fraction, "rounds=1")


@pytest.mark.parametrize(
    ("name", "slopes", "words"),
    [
        ("one_byte", b"123", "holds 3 bytes, expected 4 bytes of log8"),
        ("one_byte", 4, "holds int, expected 4 bytes"),
        ("decomfl", np.full(5, np.inf, "<f4").tobytes(), "holds inf, above"),
        ("fedkseed", np.full(2, 9, "<u2").tobytes() + bytes(8), "names direction 9 of 6"),
    ],
)
def test_what_no_honest_node_sends_is_refused(name: str, slopes: object, words: str) -> None:
    more = ("strategy.pool=6", "strategy.local_steps=2") if name == "fedkseed" else ()
    strategy = method(name, "strategy.lr=0.1", *more)
    asked = ClientQuestion(0, "fit", Payload(), 5, ClientConfig(), 1)
    assert words in strategy.objection(asked, Payload({}, {"slopes": slopes}))  # type: ignore[dict-item]
    sent = strategy.client.coding.nbytes(2 if name == "fedkseed" else strategy.heard)
    fitting = bytes(sent + (4 if name == "fedkseed" else 0))
    assert strategy.objection(asked, Payload({}, {"slopes": fitting})) == ""
