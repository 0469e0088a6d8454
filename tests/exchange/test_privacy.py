"""Clip, noise and correlated noise against reference arrays; what the settings refuse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from problems import GOLDEN

from fedsim.errors import ArgumentError, ClientError, ConfigError
from fedsim.exchange import normals as noise
from fedsim.exchange.central import CentralNoise, adapted, z_delta
from fedsim.exchange.correlated import column, correlated, levels, nodes, sensitivity
from fedsim.exchange.entries import length_of
from fedsim.exchange.privacy import AdaptiveClip, Privacy
from fedsim.exchange.release import RESIDUAL, Leaving, Release, clip
from fedsim.rng import torch_rng
from fedsim.task.layout import Layout


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"release/{name}.npz") as file:
        return dict(file)


def settings(**changes: object) -> Privacy:
    return Privacy(**{"level": "client", "z": 1.0, "delta": 1e-5, **changes})  # type: ignore[arg-type]


def given(monkeypatch: pytest.MonkeyPatch, rows: dict[str, np.ndarray]) -> None:
    """Draws of the central noise are the next row under the vector's name."""
    left = {name: iter(np.atleast_2d(row)) for name, row in rows.items()}

    def keyed(seed: int, purpose: str, *numbers: int) -> noise.Normals:
        row = torch.from_numpy(np.array(next(left[purpose.split("/")[1]])))
        return lambda n: row[:n]

    monkeypatch.setattr(noise, "keyed", keyed)


def test_golden_clip() -> None:
    z = golden("clip")
    for v, wanted, factor, fits in zip(z["updates"], z["clipped"], z["factor"], z["fits"], strict=True):
        found, by = clip(torch.from_numpy(v), float(z["C"]))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-12)
        assert by == pytest.approx(float(factor), abs=1e-12) and (by == 1.0) == bool(fits)


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 159_010, 1_000_003])
def test_lengths_are_those_of_float64(size: int) -> None:
    """Also of vectors whose squares are all alike, whose rounding has a direction, and of views."""
    rng = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=rng)
    tails = normal * torch.exp(2 * torch.randn(size, generator=rng))
    alike = [torch.full((size,), 1 + i / 7) for i in range(7)]
    views = [torch.randn(2 * size, generator=rng)[::2], torch.randn(3, size, generator=rng).T]
    small = [normal.half(), normal.bfloat16(), normal.double(), normal.requires_grad_()]
    for v in [normal, tails, *alike, *views, *small, normal * 1e-30, normal * 1e30]:
        exact = math.sqrt(float(v.detach().double().square().sum()))
        assert length_of(v) == pytest.approx(exact, rel=5e-7)
    for bad in (math.inf, -math.inf, math.nan):
        v = torch.cat([normal.detach(), torch.tensor([bad])])
        assert not math.isfinite(length_of(v))


def test_golden_noise_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    z = golden("clip")
    given(monkeypatch, {"delta": z["noise"]})
    bound, expected = float(z["C"]), float(z["q"] * z["N"])
    added = CentralNoise(settings(z=float(z["z"]), clip=bound), 0, expected, True).of(
        "delta", 24, bound, 1, 0, 0, 1
    )
    released = (torch.from_numpy(z["clipped"]).sum(0) + added) / expected
    np.testing.assert_allclose(released.numpy(), z["released"], atol=1e-12)


def test_golden_joint_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two vectors of an exchange get noise of z C_g sqrt(2) each."""
    z = golden("clip")
    given(monkeypatch, {"delta": z["noise"], "c": z["second_noise"]})
    bounds = {"delta": float(z["C"]), "c": float(z["second_C"])}
    made = CentralNoise(settings(z=float(z["z"])), 0, 1.0, True)
    for name, rows, wanted in (("delta", z["updates"], "joint_first"), ("c", z["second"], "joint_second")):
        total = sum(clip(torch.from_numpy(v), bounds[name])[0] for v in rows)
        assert isinstance(total, torch.Tensor)
        found = total + made.of(name, len(total), bounds[name], 2, 0, 0, 1)
        np.testing.assert_allclose(found.numpy(), z[wanted], atol=1e-10)


def test_golden_adaptive_bound() -> None:
    z = golden("clip")
    bound, sigma, seen = 0.1, float(z["sigma_b"]), [0.1]
    for lengths, drawn in zip(z["adaptive_norms"], z["adaptive_noise"], strict=True):
        fits = [float(n <= bound) for n in lengths]
        bound = adapted(bound, fits, float(drawn) * sigma, len(lengths), 0.2, 0.5)
        seen.append(bound)
    np.testing.assert_allclose(seen, z["adaptive_C"], rtol=1e-12)
    assert z_delta(float(z["z"]), sigma) == pytest.approx(float(z["z_delta"]), rel=1e-12)
    assert z_delta(1, 5) == pytest.approx(1.00504, abs=1e-5)


def test_the_price_of_bits_can_be_all_there_is() -> None:
    with pytest.raises(ArgumentError, match=r"twice that of the bits .*privacy.adaptive.noise=1,"):
        z_delta(1.0, 0.5)


@pytest.mark.parametrize("start", [0.1, 100.0])
def test_adaptive_bound_finds_the_median(start: float) -> None:
    rng = np.random.default_rng(0)
    made = CentralNoise(settings(clip="adaptive", adaptive=AdaptiveClip(start=start)), 3, 40.0, True)
    for t in range(150):
        made.adapt([float(n <= made.bound) for n in rng.lognormal(0, 0.5, 40)], t)
    assert made.bound == pytest.approx(1.0, rel=0.15)


def test_golden_correlated_noise() -> None:
    z = golden("matrix")
    drawn, rounds, band = torch.from_numpy(z["noise"]), int(z["T"]), int(z["b"])
    for name, width in (("", band), ("_full", rounds)):
        c = column(rounds, width)
        np.testing.assert_array_equal(c, z[f"column{name}"])
        np.testing.assert_allclose(correlated(drawn, c).numpy(), z[f"correlated{name}"], atol=1e-12)
        assert sensitivity(c, band) == pytest.approx(float(z[f"brute{name}"]), rel=1e-12)


@pytest.mark.parametrize(("rounds", "band", "wanted"), [(64, 64, 1.5456), (64, 8, 3.7077), (50, 5, 3.9535)])
def test_sensitivity_of_a_band(rounds: int, band: int, wanted: float) -> None:
    assert sensitivity(column(rounds, band), band) == pytest.approx(wanted, abs=5e-5)


def test_noise_of_rounds_is_the_matrix_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added round by round, with what a checkpoint keeps in between, is C^-1 Z; and the tree's increments."""
    z = golden("matrix")
    given(monkeypatch, {"delta": z["noise"]})
    made = CentralNoise(settings(), 0, 1.0, True, column=tuple(z["column"][: int(z["b"])]))
    rows = []
    for t in range(12):
        rows.append(made.of("delta", 3, 1.0, 1, t, 0, t + 1))
        plain, tensors = made.save()
        made.restore(plain, tensors)
    np.testing.assert_allclose(torch.stack(rows).numpy(), z["correlated"], atol=1e-12)
    assert levels(64) == 7
    fresh = np.array([z["tree_noise"][nodes(t)[-1]] for t in range(1, 13)])
    given(monkeypatch, {"delta": fresh})
    tree = CentralNoise(settings(), 0, 1.0, True, epoch=12)
    steps = torch.stack([tree.of("delta", 3, 1.0, 1, t, 0, t + 1) for t in range(12)])
    np.testing.assert_allclose(steps.cumsum(0).numpy(), z["tree_prefix"] - z["x"].cumsum(0), atol=1e-10)


@pytest.mark.parametrize("n", [1, 15, 16, 43, 1000, 4810])
def test_numbers_are_those_of_torch(n: int) -> None:
    """To the last bits of float64, and what is drawn next too."""
    ours, theirs = (torch_rng(3, "numbers") for _ in range(2))
    for size in (n, 20):
        expected = torch.randn(size, generator=theirs, dtype=torch.float64)
        torch.testing.assert_close(noise.of(ours)(size), expected, rtol=0, atol=1e-14)


def test_deviation_and_keys_of_noise() -> None:
    made = CentralNoise(settings(z=0.8), 5, 4.0, True)
    draw = made.of("delta", 100_000, 2.0, 1, 7, 0, 1)
    assert float(draw.std()) == pytest.approx(1.6, rel=0.01) and abs(
        float(draw.mean())
    ) < 4 * 1.6 / math.sqrt(1e5)
    assert torch.equal(
        draw, CentralNoise(settings(z=0.8), 5, 4.0, True).of("delta", 100_000, 2.0, 1, 7, 0, 9)
    )
    others = [
        made.of("c", 10, 2.0, 1, 7, 0, 1),
        made.of("delta", 10, 2.0, 1, 8, 0, 1),
        made.of("delta", 10, 2.0, 1, 7, 1, 1),
    ]
    assert not any(torch.equal(draw[:10], other) for other in others)
    secret = CentralNoise(settings(), 5, 4.0, False)
    assert not torch.equal(*(secret.of("delta", 10, 1.0, 1, 0, 0, 1) for _ in range(2)))


@pytest.mark.parametrize("clip", [1.0, "adaptive"])
def test_noise_drawn_ahead_is_that_of_its_round(clip: float | str) -> None:
    """Whatever came before: rounds left out, other vectors, a second exchange, another size, another bound."""

    def fresh(rounds: int = 0) -> CentralNoise:
        return CentralNoise(settings(clip=clip), 5, 40.0, True, rounds=rounds)

    made = fresh(rounds=5)
    asked = [("delta", 9, 0, 0), ("c", 9, 0, 0), ("delta", 9, 1, 0), ("delta", 9, 1, 1), ("c", 9, 3, 0)]
    bounds = itertools.cycle((1.0, 1.0, 0.7))
    for vector, size, round, exchange in [*asked, ("delta", 5, 2, 0), ("c", 9, 4, 0), ("c", 9, 4, 0)]:
        given = vector, size, next(bounds), 1, round, exchange, 1
        assert torch.equal(made.of(*given), fresh().of(*given)), given
        if not exchange:
            made.draw_ahead(vector, size, 1.0, 1, round + 1)
    assert [key[2] for key in made._ahead] == [3]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"z": None}, "privacy.z=1, or the budget"),
        ({"epsilon": 2.0}, "not both"),
        ({"delta": None}, "delta=None: must be given"),
        ({"delta": 1.0}, r"must lie in \(0, 1\)"),
        ({"clip": math.inf}, "clip=inf: must be positive and finite"),
        ({"clip": "adaptiv"}, "or adaptive"),
        ({"clips": {"c": 0.0}}, "clips.c"),
        ({"level": "local", "clip": "adaptive"}, "privacy=client only"),
        ({"level": "local", "mechanism": "tree"}, "privacy=client only"),
        ({"level": "record", "accountant": "pld"}, "privacy=client only"),
        ({"mechanism": "banded", "clip": "adaptive"}, "one bound"),
        ({"noise": "distributed"}, "type privacy.where=distributed"),
        ({"where": "distributed", "clip": "adaptive"}, "whether they fit"),
        ({"where": "distributed", "mechanism": "banded"}, "drawn afresh"),
        ({"where": "distributed", "level": "local"}, "goes with privacy=client only"),
        ({"accountant": "prv"}, "choose one of rdp, pld"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        settings(**changes)


def test_what_else_an_update_holds_is_refused() -> None:
    v = torch.zeros(2)
    privacy = settings()
    privacy.check_update({"delta": v}, ["delta"], {"weight": 1.0, "work": 3.0}, frozenset({"work"}))
    for arrays, values, why in (
        ({"delta": v}, {"weight": 5.0}, "weighs 5.0"),
        ({"delta": v, "n": v}, {}, "'n' leaves"),
        ({"delta": v.long()}, {}, "'delta' leaves"),
        ({"delta": v}, {"loss": 0.1}, "the value 'loss'"),
    ):
        with pytest.raises(ClientError, match=why):
            privacy.check_update(arrays, ["delta"], values, frozenset())


class Doubling:
    """A codec whose vectors arrive twice as long."""

    unbiased = linear = shared = False
    lengthens = feedback = True
    feedback_decay = 1.0

    def takes(self, vector: str) -> bool:
        return True

    def encode(self, v: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(v.numpy().tobytes(), dtype=np.uint8).copy())

    def decode(self, frame: torch.Tensor, *_: object) -> torch.Tensor:
        return 2 * torch.from_numpy(np.frombuffer(frame.numpy().tobytes(), dtype=np.float64).copy())

    def shrink(self, frame: torch.Tensor, factor: float, *_: object) -> torch.Tensor:
        return self.encode(self.decode(frame) / 2 * factor)


def test_clip_comes_before_the_residual_and_the_frame_is_fitted() -> None:
    """(3, 0, 4) is clipped to (.6, 0, .8); what was left of before is added; what is decoded is no longer than C."""
    layout = Layout(torch.nn.Linear(3, 1, bias=False), torch.float64)
    kept = {f"{RESIDUAL}delta": torch.tensor([1.0, 0.0, 0.0])}
    about = Leaving(0, 0, 0, "fit", layout, kept=kept)
    v = layout.expand(torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64))
    release = Release(settings(), Doubling())  # type: ignore[arg-type]
    sent = release.leave({"delta": v}, {"weight": 1.0}, {"delta": ("sum",)}, about)
    x = np.array([1.6, 0.0, 0.8])
    y = layout.compact(sent.arrays["delta"]).numpy()
    np.testing.assert_allclose(y, x / np.linalg.norm(x), atol=1e-12)
    np.testing.assert_allclose(sent.state[f"{RESIDUAL}delta"].numpy(), x - y, atol=1e-12)
    assert sent.values["release/fits"] == 0.0 and sent.frames["delta"].dtype == torch.uint8
