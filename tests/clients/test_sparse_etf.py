"""The sparse ETF classifier and the realignments, against the authors' code and by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from problems import GOLDEN

from clients.etf import etf_loss, simplex_etf
from fedsim.errors import ArgumentError, ConfigError
from strategies.fedloge import realign_global, realign_local, sparse_etf


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "fedloge_sse.npz") as z:
        return dict(z)


def cosines(weight):
    unit = weight / weight.norm(dim=1, keepdim=True)
    return (unit @ unit.T)[~torch.eye(len(weight), dtype=torch.bool)]


@pytest.mark.filterwarnings("ignore:mask. classes 0 and 1")
@pytest.mark.parametrize(
    ("steps", "tolerance", "turned"),
    [(1, 1e-10, False), (1, 1e-10, True), (100, 1e-10, True), (1000, 1e-10, False), (10_000, 1e-8, False)],
)
def test_adam_follows_the_authors_code(golden, steps, tolerance, turned):
    """The golden arrays have classes as columns: both ways round are understood, and M * mask is W0."""
    mask, start = (golden["mask"].T, golden["M"].T) if turned else (golden["mask"], golden["W0"])
    w = sparse_etf(5, 16, solver="adam", mask=mask, start=start, steps=steps)
    np.testing.assert_allclose(w.numpy().T, golden[f"W_{steps}"], rtol=0, atol=tolerance)
    at = list(golden["snaps"]).index(steps)
    assert etf_loss(w, float(golden["gamma"])) == pytest.approx(golden["loss"][at], abs=1e-10)


def test_the_frame_is_the_golden_one_of_its_draw(golden):
    q = np.linalg.qr(golden["a"])[0]
    expected = math.sqrt(5 / 4) * q @ (np.eye(5) - 0.2)
    np.testing.assert_allclose(golden["M"], expected, rtol=0, atol=1e-12)
    frame = simplex_etf(5, 16, seed=3)
    np.testing.assert_allclose(frame @ frame.T, golden["M"].T @ golden["M"], rtol=0, atol=1e-12)


def test_classes_without_a_common_feature_stay_at_ninety_degrees(golden):
    with pytest.warns(UserWarning, match="classes 0 and 1 have no entry in common"):
        w = sparse_etf(5, 16, mask=golden["mask"])
    assert float(cosines(w).max()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("dim", "classes"), [(512, 10), (64, 10), (128, 20)])
def test_the_projection_reaches_the_optimum_that_adam_approaches(dim, classes):
    w = sparse_etf(classes, dim)
    assert w.shape == (classes, dim) and w.dtype == torch.float64
    assert int((w == 0).sum()) == int(0.6 * dim * classes)
    np.testing.assert_allclose(w.norm(dim=1), 0.1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cosines(w), -1 / (classes - 1), rtol=0, atol=2e-5)
    assert etf_loss(w, 0.1) == pytest.approx(-math.acos(-1 / (classes - 1)), abs=1e-6)
    worse = sparse_etf(classes, dim, solver="adam", steps=300)
    assert int((worse == 0).sum()) == int((w == 0).sum())
    assert etf_loss(w, 0.1) < etf_loss(worse, 0.1)


@pytest.mark.filterwarnings("ignore:sparsity")
def test_projection_by_another_route():
    """The polar factor by an SVD of the tall matrix, as the specification writes it."""
    mask = sparse_etf(6, 40, seed=5, steps=0) != 0
    w = simplex_etf(6, 40, seed=5).T * mask.T
    t = math.sqrt(6 / 5) * (torch.eye(6, dtype=torch.float64) - 1 / 6)
    for _ in range(7):
        u, _, vt = torch.linalg.svd(w / w.norm(dim=0) @ t, full_matrices=False)
        w = u @ vt @ t * mask.T
    expected = 0.3 * (w / w.norm(dim=0)).T
    np.testing.assert_allclose(sparse_etf(6, 40, seed=5, steps=7, norm=0.3), expected, rtol=0, atol=1e-12)


def test_the_classifier_depends_on_its_arguments_alone():
    torch.manual_seed(1)
    one = sparse_etf(10, 64, seed=4)
    torch.manual_seed(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = sparse_etf(10, 64, seed=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, again)
    assert not torch.equal(one, sparse_etf(10, 64, seed=5))


def test_no_sparsity_is_the_dense_frame():
    np.testing.assert_allclose(
        sparse_etf(7, 9, sparsity=0, norm=1, seed=2), simplex_etf(7, 9, 2), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("classes", "dim", "sparsity"), [(3, 5, 0.6), (5, 16, 0.6), (10, 10, 0.6), (12, 14, 0.65)]
)
@pytest.mark.parametrize("seed", range(5))
def test_masks_are_repaired_until_all_classes_overlap(classes, dim, sparsity, seed):
    with pytest.warns(UserWarning, match="features in common"):
        kept = sparse_etf(classes, dim, sparsity=sparsity, seed=seed, steps=0) != 0
    common = kept.double() @ kept.double().T
    assert int(common.diagonal().min()) >= 2 and int(common.min()) >= 1
    assert int((~kept).sum()) == int(sparsity * dim * classes)


def test_a_mask_that_cannot_be_repaired_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ArgumentError, match=r"no support of 3 entries.*give a smaller sparsity"):
            sparse_etf(5, 5, sparsity=0.9)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((10, 8), {}, "dim=8: 10 classes need at least 10 features"),
        ((1, 8), {}, "num_classes=1"),
        ((3, 8), {"sparsity": 1.0}, "sparsity=1.0"),
        ((3, 8), {"norm": 0}, "norm=0"),
        ((3, 8), {"solver": "sgd"}, "projection, adam"),
        ((3, 8), {"steps": -1}, "steps=-1"),
        ((3, 8), {"mask": np.ones((4, 8))}, r"mask has shape \(4, 8\), expected \(3, 8\)"),
        ((3, 8), {"mask": np.eye(3, 8) * [[1], [1], [0]]}, "class 2 keeps no entry"),
        ((3, 8), {"mask": np.ones((3, 8)), "start": np.eye(3, 8) * [[1], [0], [1]]}, "start: a class"),
    ],
)
def test_impossible_arguments_are_named(arguments, options, words):
    with pytest.raises(ValueError, match=words) as raised:
        sparse_etf(*arguments, **options)
    assert isinstance(raised.value, ConfigError)


def test_realigned_by_hand():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    torch.testing.assert_close(realign_global(weight), 1.7 * torch.tensor([[0.6, 0.8], [0, 0], [0, -1]]))
    local = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(realign_local(local, weight), torch.tensor([[6.0, 8.0], [0, 0], [0, 0]]))
    np.testing.assert_allclose(realign_global(np.array([[3, 4]]), scale=1), [[0.6, 0.8]], rtol=1e-6)


def test_the_realigned_global_head_forgets_the_lengths_of_its_rows():
    g = torch.Generator().manual_seed(0)
    weight, h = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (4, 9))
    stretched = weight * torch.tensor([[0.1], [1], [7], [30]])
    torch.testing.assert_close(h @ realign_global(stretched).T, h @ realign_global(weight).T)
    for scale in (0.3, 5.0):  # without the bias, the scale has no say in the ranking
        ranks = (h @ realign_global(weight, scale=scale).T).argsort(dim=1)
        assert torch.equal(ranks, (h @ realign_global(weight).T).argsort(dim=1))


def test_a_class_nobody_has_keeps_the_norm_of_its_start_in_the_local_head():
    """Default initialisation of a linear layer: rows of length about 1/sqrt(3), whatever the width."""
    torch.manual_seed(0)
    for dim in (64, 512, 2048):
        linear = torch.nn.Linear(dim, 10)
        lengths = realign_local(linear.weight.detach(), torch.ones(10, 1))
        assert float(lengths.mean()) == pytest.approx(3**-0.5, rel=0.05)
