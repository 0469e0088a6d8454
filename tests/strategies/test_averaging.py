"""The variance-corrected average against independently computed numbers, its laws, and the stacked form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import GOLDEN, network
from scipy.sparse import csr_array
from torch import Tensor, nn

from fedsim.task.layout import Layout
from fedsim.task.vectors import FlatModel
from strategies.averaging import Correction, mix, variances
from strategies.gossip import variance_corrected_average

Models = list[dict[str, Tensor]]
NAMES = ("fc1.weight", "fc1.bias", "conv.weight", "bn.weight", "scale")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "vc_gossip.npz") as z:
        return dict(z)


def models_of(golden: dict[str, np.ndarray], case: int) -> Models:
    n = len(golden[f"case{case}/weights"])
    return [{k: torch.tensor(golden[f"case{case}/in{i}/{k}"]) for k in NAMES} for i in range(n)]


RESULTS: dict[str, dict[str, Any]] = {
    "plain": {"strength": 0.0},
    "others/matrices": {},
    "others/all": {"scope": "all"},
    "row/matrices": {"target": "row"},
    "row/all": {"target": "row", "scope": "all"},
    "self/matrices": {"target": "self"},
    "self/all": {"target": "self", "scope": "all"},
    "others/matrices/eps1e-4": {"eps": 1e-4},
    "no_own_equal": {"own_weight": 0.0},
}


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("case", [0, 1])
def test_the_golden_averages(golden: dict[str, np.ndarray], case: int, result: str) -> None:
    own, *received = models_of(golden, case)
    out = variance_corrected_average(own, received, **RESULTS[result])
    for name in NAMES:
        expected = golden[f"case{case}/{result}/{name}"]
        np.testing.assert_allclose(out[name].numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [0, 1])
def test_weights_may_be_given_for_the_others_or_as_a_whole_row(
    golden: dict[str, np.ndarray], case: int
) -> None:
    own, *received = models_of(golden, case)
    row = torch.tensor(golden[f"case{case}/weights"])
    expected = variance_corrected_average(own, received)
    for weights in (row, row[1:], 7 * row[1:], (3 * row).tolist()):
        out = variance_corrected_average(own, received, weights=weights)
        for name in NAMES:
            torch.testing.assert_close(out[name], expected[name], rtol=0, atol=1e-14)


def some_models(n: int, seed: int = 0) -> Models:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (6, 4), "a.bias": (6,), "b.weight": (3, 2, 3)}
    return [
        {k: (i + 1) * torch.randn(s, generator=g, dtype=torch.float64) + i for k, s in shapes.items()}
        for i in range(n)
    ]


def test_identical_models_come_back_unchanged() -> None:
    own = some_models(1)[0]
    for target in ("received", "row", "self"):
        out = variance_corrected_average(own, [dict(own)] * 3, target=target, scope="all")
        for name, value in own.items():
            torch.testing.assert_close(out[name], value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("target", ["received", "row", "self"])
def test_the_result_has_the_target_variance_and_the_mean_of_the_mix(target: str) -> None:
    own, *received = models = some_models(4)
    weights = [0.1, 0.2, 0.3]
    out = variance_corrected_average(
        own, received, own_weight=0.4, weights=weights, target=target, scope="all"
    )
    for name in own:
        of = [float(m[name].var(correction=0)) for m in models]
        wanted = {
            "received": sum(of[1:]) / 3,
            "row": 0.4 * of[0] + sum(w * v for w, v in zip(weights, of[1:], strict=True)),
            "self": of[0],
        }[target]
        mixed = 0.4 * own[name] + sum(w * m[name] for w, m in zip(weights, received, strict=True))
        assert float(out[name].var(correction=0)) == pytest.approx(wanted, rel=1e-12)
        assert float(out[name].mean()) == pytest.approx(float(mixed.mean()), rel=1e-12)


def test_scaling_all_models_scales_the_result_and_their_order_does_not_matter() -> None:
    own, *received = some_models(5)
    out = variance_corrected_average(own, received, scope="all")
    scaled = variance_corrected_average(
        {k: 3 * v for k, v in own.items()}, [{k: 3 * v for k, v in m.items()} for m in received], scope="all"
    )
    turned = variance_corrected_average(own, received[::-1], scope="all")
    for name, value in out.items():
        torch.testing.assert_close(scaled[name], 3 * value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(turned[name], value, rtol=1e-12, atol=1e-12)


def test_strength_scales_what_the_factor_departs_from_one() -> None:
    own, *received = some_models(3)
    plain, half, full = (
        variance_corrected_average(own, received, strength=s)["a.weight"] for s in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(half, (plain + full) / 2, rtol=1e-12, atol=1e-12)


def test_what_is_not_corrected() -> None:
    """Constant tensors, opposite ones, single entries; by default biases; by a pattern all but what it names."""
    own, other = some_models(2)
    own |= {
        "ones": torch.ones(3, 3).double(),
        "one": torch.tensor(2.0).double(),
        "sign": own["a.weight"].clone(),
    }
    other |= {"ones": torch.ones(3, 3).double(), "one": torch.tensor(4.0).double(), "sign": -own["a.weight"]}
    out = variance_corrected_average(own, [other], scope="all")
    assert torch.equal(out["ones"], own["ones"]) and float(out["one"]) == 3.0
    assert float(out["sign"].abs().max()) == 0.0
    plain = variance_corrected_average(own, [other], strength=0)
    default = variance_corrected_average(own, [other])
    assert torch.equal(default["a.bias"], plain["a.bias"])
    assert not torch.equal(default["b.weight"], plain["b.weight"])
    named = variance_corrected_average(own, [other], scope=r"^a\.")
    assert torch.equal(named["b.weight"], plain["b.weight"])
    assert torch.equal(named["a.weight"], default["a.weight"])
    assert not torch.equal(named["a.bias"], plain["a.bias"])


def test_counters_and_batch_norm_statistics_are_the_peers_own() -> None:
    nets, g = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)], torch.Generator().manual_seed(0)
    for net, batches in zip(nets, (1, 2), strict=True):
        for _ in range(batches):
            net(2 * torch.randn(8, 4, generator=g) + 1)
    own, other = (net.state_dict() for net in nets)
    out = variance_corrected_average(own, [other], scope="all")
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(out[name], own[name])
    mixed = variance_corrected_average(own, [other], scope="all", bn_stats="average")
    torch.testing.assert_close(mixed["running_mean"], (own["running_mean"] + other["running_mean"]) / 2)
    assert int(mixed["num_batches_tracked"]) == 1


def test_without_messages_the_model_stays_and_is_a_copy() -> None:
    own = some_models(1)[0]
    out = variance_corrected_average(own, [])
    for name, value in own.items():
        assert torch.equal(out[name], value) and out[name].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_measured_in_float32(dtype: torch.dtype) -> None:
    """A variance of 1e-6 cannot be squared in float16."""
    g = torch.Generator().manual_seed(1)
    models = [{"w": (1e-3 * torch.randn(200, 50, generator=g)).to(dtype)} for _ in range(3)]
    out = variance_corrected_average(models[0], models[1:])["w"]
    assert out.dtype == dtype
    double = [{"w": m["w"].double()} for m in models]
    exact = variance_corrected_average(double[0], double[1:])["w"]
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "others"}, "target='others': choose one of received, row, self"),
        ({"scope": "("}, "scope='\\('"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"own_weight": 1.5}, "own_weight=1.5"),
        ({"weights": [1.0]}, "expected 2 non-negative"),
        ({"weights": [0.0, 0.0]}, "positive sum"),
        ({"weights": [0.2, 0.4, 0.4], "own_weight": 0.3}, "contradicts"),
        ({"bn_stats": "mine"}, "bn_stats='mine'"),
    ],
)
def test_impossible_options_are_refused(change: dict[str, Any], message: str) -> None:
    own, *received = some_models(3)
    with pytest.raises(ValueError, match=message):
        variance_corrected_average(own, received, **change)


def test_other_models_than_ones_own_are_refused_by_name() -> None:
    own, other = some_models(2)
    with pytest.raises(ValueError, match=r"received\[0\].*a\.bias"):
        variance_corrected_average(own, [{k: v for k, v in other.items() if k != "a.bias"}])
    with pytest.raises(ValueError, match=r"received\[1\]: 'a\.bias' has shape \(5,\), expected \(6,\)"):
        variance_corrected_average(own, [other, other | {"a.bias": torch.zeros(5)}])


# -- stacked form -------------------------------------------------------------------------------------------------


def stacked(n: int) -> tuple[np.ndarray, Layout]:
    layout = FlatModel(network("bn"), torch.float64).layout
    g = torch.Generator().manual_seed(3)
    scale = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    rows = scale * torch.randn(n, layout.size, generator=g, dtype=torch.float64)
    return layout.expand(rows).numpy(), layout


@pytest.mark.parametrize("target", ["received", "row", "self"])
@pytest.mark.parametrize("scope", ["matrices", "all"])
def test_the_stacked_form_is_the_form_per_peer(target: str, scope: str) -> None:
    x, layout = stacked(5)
    counts = np.array([[0, 1, 0, 0, 1], [1, 0, 2, 0, 1], [0] * 5, [1, 1, 1, 0, 1], [0, 0, 0, 1, 0]], float)
    own = np.array([0.5, 0.2, 1.0, 0.0, 0.7])
    share = counts * np.array([1, 3, 1, 1, 1])[None]
    weights = (1 - own)[:, None] * share / np.maximum(share.sum(1), 1)[:, None]
    before = x.copy()
    mix(x, x, own, csr_array(weights), csr_array(counts), layout.params, Correction(target, scope))
    assert np.array_equal(x[2], before[2])
    for i in (0, 1, 3, 4):
        senders = [j for j in range(5) for _ in range(int(counts[i, j]))]
        each = [share[i, j] / counts[i, j] for j in senders]
        out = variance_corrected_average(
            layout.named(torch.tensor(before[i])),
            [layout.named(torch.tensor(before[j])) for j in senders],
            own_weight=own[i],
            weights=each,
            target=target,
            scope=scope,
        )
        for name, value in layout.named(torch.tensor(x[i])).items():
            torch.testing.assert_close(value, out[name], rtol=1e-12, atol=1e-12)


def test_large_tensors_go_in_blocks_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layout = stacked(6)
    counts = csr_array(np.ones((6, 6)) - np.eye(6))
    arguments = np.full(6, 0.5), csr_array(counts * 0.1), counts, layout.params, Correction(scope="all")
    whole, parts = x.copy(), x.copy()
    mix(whole, whole, *arguments)
    monkeypatch.setattr("strategies.averaging.BLOCK", 8)
    mix(parts, parts, *arguments)
    np.testing.assert_allclose(parts, whole, rtol=1e-13)


def test_shipped_variances_are_used_as_they_are() -> None:
    x, layout = stacked(3)
    counts = csr_array(np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]]))
    shipped = 4 * variances(x, layout.params)
    mix(x, x, np.full(3, 0.5), counts * 0.25, counts, layout.params, Correction(), pool_variances=shipped)
    found = variances(x, layout.params)
    for k, slot in enumerate(layout.params):
        if len(slot.shape) > 1:
            np.testing.assert_allclose(found[0, k], shipped[1:, k].mean(), rtol=1e-12)


def test_float32_statistics_hold_their_precision() -> None:
    """Far from zero the sum of squares would lose everything; two passes do not."""
    _, layout = stacked(1)
    g = np.random.default_rng(0)
    x = (1000 + g.normal(size=(4, layout.dim))).astype(np.float32)
    exact = variances(x.astype(np.float64), layout.params)
    np.testing.assert_allclose(variances(x, layout.params), exact, rtol=1e-4)
