"""GGEUR's pure functions against the golden arrays and numbers computed another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GOLDEN
from torch import Tensor

from clients.geometry import ClassStatistics, similarity
from clients.noise import KeyedNoise
from strategies.ggeur import augment, class_geometry, class_statistics, merge_statistics


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)))


def one_class(x: Tensor) -> ClassStatistics:
    return class_statistics(x, torch.zeros(len(x), dtype=torch.int64), 1)


def dense(x: Tensor) -> Tensor:
    """Covariance with divisor n, by NumPy."""
    return torch.from_numpy(np.cov(x.double().numpy().T, bias=True).reshape(x.shape[1], x.shape[1]))


@pytest.mark.parametrize("case", ["full", "single", "same"])
def test_golden_covariances(case: str) -> None:
    with np.load(GOLDEN / "ggeur_covariance.npz") as stored:
        z = {k: torch.from_numpy(v) for k, v in stored.items()}
    parts = [one_class(z[f"{case}_X{k}"]) for k in range(len(z[f"{case}_n"]))]
    assert [int(p.n) for p in parts] == z[f"{case}_n"].tolist()
    for k, part in enumerate(parts):
        if f"{case}_S{k}" in z:
            torch.testing.assert_close(part.mu[0], z[f"{case}_mu{k}"], rtol=0, atol=1e-12)
            torch.testing.assert_close(part.S[0], z[f"{case}_S{k}"], rtol=0, atol=1e-12)
    whole = merge_statistics(parts)
    torch.testing.assert_close(whole.mu[0], z[f"{case}_mu"], rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.S[0], z[f"{case}_S"], rtol=0, atol=1e-12)
    geometry = class_geometry(whole)
    torch.testing.assert_close(geometry.covariance(0), z[f"{case}_S"], rtol=0, atol=1e-12)
    lam = torch.zeros_like(z[f"{case}_lam"])
    lam[: geometry.ranks[0]] = geometry.lam[0]
    torch.testing.assert_close(lam, z[f"{case}_lam"], rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 1000))
def test_merging_in_any_order_gives_the_pooled_statistics(sizes: list[int], d: int, seed: int) -> None:
    parts = [rows(n, d, seed + i) * (i + 1) + i for i, n in enumerate(sizes)]
    found = [one_class(x) for x in parts]
    pooled = one_class(torch.cat(parts))
    late = merge_statistics(found[:1])
    for part in found[1:][::-1]:  # one after the other, backwards
        late = merge_statistics([late, part])
    for merged in (merge_statistics(found), late):
        assert merged.n.tolist() == pooled.n.tolist()
        torch.testing.assert_close(merged.mean, pooled.mean, rtol=0, atol=1e-11)
        torch.testing.assert_close(merged.S, pooled.S, rtol=0, atol=1e-11)
        assert len(merged.factors[0]) <= max(d, sum(sizes) + len(sizes))
    if sum(sizes) > 1:
        torch.testing.assert_close(pooled.S[0], dense(torch.cat(parts)), rtol=0, atol=1e-11)


def test_a_factor_is_never_larger_than_the_rows_or_the_space() -> None:
    for n, d in ((1, 5), (2, 5), (5, 5), (6, 5), (40, 5)):
        part = one_class(rows(n, d))
        assert part.factors[0].shape == (min(n - 1, d), d)
        assert torch.equal(part.factors[0], part.factors[0].triu())  # a triangle: r d - r (r - 1) / 2 numbers
        assert class_geometry(part).ranks == [min(n - 1, d)]


def test_a_factor_says_no_more_than_the_covariance() -> None:
    """Turned or reordered rows with the same covariance give the same factor."""
    x = rows(4, 9)
    x -= x.mean(0)
    torch.testing.assert_close(one_class(x.flip(0)).factors[0], one_class(x).factors[0])
    torch.testing.assert_close(one_class(-x).factors[0], one_class(x).factors[0])


def test_wide_embeddings_never_make_a_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """d = 20 000: a (d, d) matrix would be 3.2 GB."""
    d = 20_000
    parts = [one_class(rows(3, d, k)) for k in range(4)]
    geometry = class_geometry(merge_statistics(parts))
    assert geometry.ranks == [11]
    x, y = augment(rows(3, d), torch.zeros(3, dtype=torch.int64), geometry, target=5, noise=torch.Generator())
    assert x.shape == (5, d) and len(y) == 5


def test_forgetting_the_means_is_a_mistake_that_shows() -> None:
    a, b = rows(20, 3), rows(20, 3, 1) + 5
    merged = merge_statistics([one_class(a), one_class(b)])
    within = (dense(a) + dense(b)) / 2
    assert float((merged.S[0] - within).abs().max()) > 5


def test_coverage_takes_the_largest_contributors() -> None:
    parts = [one_class(rows(n, 3, n)) for n in (5, 60, 20, 15)]
    merged = merge_statistics(parts, coverage=0.8)
    pooled = one_class(torch.cat([rows(60, 3, 60), rows(20, 3, 20)]))
    assert merged.n.tolist() == [80]
    torch.testing.assert_close(merged.S, pooled.S)


def test_energy_keeps_the_fewest_directions() -> None:
    lam = torch.tensor([6.0, 3.0, 0.9, 0.1], dtype=torch.float64)
    stats = ClassStatistics(torch.tensor([9]), torch.zeros(1, 4).double(), (torch.diag(lam.sqrt()),))
    for energy, p in ((1.0, 4), (0.99, 3), (0.9, 2), (0.6, 1), (0.59, 1), (0.61, 2)):
        assert class_geometry(stats, energy=energy).ranks == [p]
    torch.testing.assert_close(class_geometry(stats).lam[0], lam)
    torch.testing.assert_close(class_geometry(stats, scale="eigenvalue").lam[0], lam**2)


def test_boosts_of_the_authors_code() -> None:
    """On a dense d x d eigen-problem with ascending eigenvalues, the code's first ten are the smallest ten."""
    x = rows(40, 12)
    stats = one_class(x)
    values, vectors = np.linalg.eigh(dense(x).numpy())
    boost = np.ones(12)
    boost[:10] = np.linspace(5, 1, 10)
    expected = torch.from_numpy(vectors @ np.diag(values * boost) @ vectors.T)
    torch.testing.assert_close(class_geometry(stats, boost="code").covariance(0), expected)
    down = torch.from_numpy(vectors @ np.diag(values * boost[::-1]) @ vectors.T)
    torch.testing.assert_close(class_geometry(stats, boost="top10").covariance(0), down)
    few = one_class(rows(3, 30))
    torch.testing.assert_close(class_geometry(few, boost="code").covariance(0), few.S[0])


def test_jitter_adds_a_variance_everywhere() -> None:
    geometry = class_geometry(one_class(rows(2, 4)), jitter=0.25)
    noise = torch.Generator().manual_seed(0)
    x, _ = augment(torch.zeros(1, 4).double(), torch.zeros(1).long(), geometry, target=40_001, noise=noise)
    torch.testing.assert_close(dense(x[1:]), geometry.covariance(0), rtol=0, atol=0.06)


def test_similarity_counts_shared_directions() -> None:
    basis = torch.eye(8, dtype=torch.float64)
    assert similarity(basis[:6] * 3, -basis[:6]) == pytest.approx(5)
    assert similarity(basis[:6], basis[[0, 1, 5, 6, 7, 2]]) == pytest.approx(2)


# -- generated rows -----------------------------------------------------------------------------------------------


def geometry_of(x: Tensor, y: Tensor, classes: int, **options: object) -> Any:
    return class_geometry(class_statistics(x, y, classes), **options)  # type: ignore[arg-type]


def test_rows_are_filled_up_by_hand() -> None:
    """Class 0: 2 rows to 5, by turns 0 1 0; class 1: one row to 5; class 2: absent here; class 3: absent everywhere."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1])
    pooled = torch.cat([x, torch.tensor([[0.0, 3.0], [0.0, -3.0], [9.0, 11.0]], dtype=torch.float64)])
    geometry = geometry_of(pooled, torch.tensor([0, 0, 1, 2, 2, 1]), 4)
    new_x, new_y = augment(x, y, geometry, target=5, noise=lambda n, p: torch.ones(n, p))
    assert torch.equal(new_x[:3], x) and new_y.tolist() == [0, 0, 1] + [0] * 3 + [1] * 4
    # class 0: mean 1.5, S = diag(1/4, 0); class 1: S = diag(0, 1); directions up to sign
    assert (new_x[3:6, 0] - torch.tensor([1.0, 2.0, 1.0])).abs().tolist() == pytest.approx([0.5] * 3)
    assert (new_x[6:, 1] - 9).abs().tolist() == pytest.approx([1.0] * 4)


def test_other_domains_are_filled_around_their_prototypes() -> None:
    x, y = torch.zeros(4, 2).double(), torch.tensor([0, 0, 0, 0])
    geometry = geometry_of(torch.zeros(5, 2).double(), torch.tensor([0, 0, 0, 1, 1]), 3)
    means = torch.full((2, 3, 2), float("nan")).double()
    means[0, 0], means[0, 1], means[1, 1] = (torch.tensor([i, -i]) for i in (1.0, 2.0, 3.0))
    new_x, new_y = augment(
        x, y, geometry, target=3, prototypes=means, per_prototype=2, noise=torch.Generator()
    )
    assert new_y[4:].tolist() == [
        0,
        0,
        1,
        1,
        1,
        1,
    ]  # T below n: nothing in step 1; class 1 absent here: step 2 only
    assert new_x[4:, 0].tolist() == [1, 1, 2, 2, 3, 3]  # S = 0: copies
    none, _ = augment(x, y, geometry, target=3, prototypes=means, per_prototype=0, noise=torch.Generator())
    assert torch.equal(none, x)
    parts = [class_statistics(rows(4, 2, i), torch.tensor([0, 0, 1, 1]), 3) for i in range(2)]
    some, labels = augment(
        x, y, geometry, target=0, prototypes=parts, per_prototype=1, noise=torch.Generator()
    )
    assert labels[4:].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(some[4:], torch.stack([parts[q].mean[c] for c in (0, 1) for q in (0, 1)]))


def test_moments_of_generated_rows_are_those_of_the_class() -> None:
    pooled, y = rows(50, 6) * torch.arange(1, 7), torch.zeros(50, dtype=torch.int64)
    for noise in (torch.Generator().manual_seed(1), 77):
        new, _ = augment(
            torch.zeros(1, 6).double(), y[:1], geometry_of(pooled, y, 1), target=60_001, noise=noise
        )
        torch.testing.assert_close(dense(new[1:]), dense(pooled), rtol=0, atol=0.6)
        assert float(new[1:].mean(0).abs().max()) < 0.1


def test_rows_of_one_client_of_one_row_are_copies() -> None:
    x, y = rows(1, 4).float(), torch.tensor([1])
    new, labels = augment(x, y, geometry_of(x, y, 3), target=4, noise=5)
    assert torch.equal(new, x.expand(4, 4)) and labels.tolist() == [1] * 4 and new.dtype == torch.float32


def test_noise_may_be_given_in_several_forms() -> None:
    x, y = rows(3, 4), torch.tensor([0, 1, 1])
    geometry, numbers = geometry_of(rows(9, 4, 1), torch.arange(9) % 2, 2), rows(9, 4, 2)
    given = [augment(x, y, geometry, target=6, noise=n)[0] for n in (numbers, numbers.numpy())]
    assert torch.equal(*given) and given[0].shape == (12, 4)
    torch.testing.assert_close(given[0][3], x[0] + numbers[0] @ geometry[0])
    by_numpy, _ = augment(x, y, geometry, target=6, noise=np.random.default_rng(5))
    first = torch.from_numpy(np.random.default_rng(5).normal(size=(5, len(geometry[0]))))
    torch.testing.assert_close(by_numpy[3:8], x[[0] * 5] + first @ geometry[0])


def test_keyed_noise_depends_on_its_address_only() -> None:
    noise = KeyedNoise(2**63 + 5)
    whole = noise(3, torch.arange(100), 9)
    assert torch.equal(noise(3, torch.tensor([70, 2]), 9), whole[[70, 2]])
    assert torch.equal(noise(3, torch.arange(100), 4), whole[:, :4])
    assert not torch.equal(noise(4, torch.arange(100), 9), whole)
    assert not torch.equal(KeyedNoise(6)(3, torch.arange(100), 9), whole)


def test_keyed_noise_is_normal() -> None:
    z = KeyedNoise(1)(0, torch.arange(20_000), 32).double()
    assert abs(float(z.mean())) < 0.005 and abs(float(z.var()) - 1) < 0.01
    assert abs(float((z**3).mean())) < 0.02 and abs(float((z**4).mean()) - 3) < 0.05
    assert float((z.T @ z / len(z) - torch.eye(32)).abs().max()) < 0.04
    assert float((z[1:] * z[:-1]).mean().abs()) < 0.005


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.tensor([[1.0], [float("inf")]]), torch.tensor([0, 0]), "row 1 is not finite"),
        (torch.ones(2, 1), torch.tensor([0, 3]), "labels run from 0 to 3; expected 0 to 2"),
        (torch.ones(2, 1, 1), torch.tensor([0, 0]), r"expected \(n, d\)"),
    ],
)
def test_rows_that_cannot_count(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_statistics(x, y, 3)


def test_statistics_of_single_precision_rows_are_taken_in_double() -> None:
    """Rows far from the origin: in float32 arithmetic a variance of 1e-4 beside a mean of 1000 would be lost."""
    x = (1000 + 0.01 * rows(200, 3)).float()
    part = one_class(x)
    assert part.mean.dtype == part.factors[0].dtype == torch.float64
    torch.testing.assert_close(part.S[0], dense(x), rtol=1e-6, atol=0)


def test_statistics_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"statistics 1 have \(classes, d\) = \(1, 4\)"):
        merge_statistics([one_class(rows(2, 3)), one_class(rows(2, 4))])
    with pytest.raises(ValueError, match="no statistics"):
        merge_statistics([])
    with pytest.raises(ValueError, match="0 < energy <= 1"):
        class_geometry(one_class(rows(2, 3)), energy=0)
    with pytest.raises(ValueError, match="noise is str"):
        augment(rows(1, 3), torch.zeros(1).long(), class_geometry(one_class(rows(2, 3))), target=2, noise="x")
