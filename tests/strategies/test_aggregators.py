"""Robust rules: golden arrays, hand-checked numbers, whatever holds the updates, bad input. The flag: test_flag.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import classification
from rules import draw, each_rule, golden

from fedsim.errors import ConfigError
from strategies import aggregators
from strategies.aggregators import (
    bulyan,
    coordinate_median,
    flag,
    geometric_median,
    krum,
    meamed,
    mean,
    multi_krum,
    norm_clip,
    phocas,
    trimmed_mean,
)
from strategies.aggregators.rows import PIECE, Rows

# -- golden arrays ------------------------------------------------------------------------------------------------


ROBUST: dict[str, Callable[[Any, int], Any]] = {
    "public_average": lambda u, f: mean(u),
    "public_median": lambda u, f: coordinate_median(u, even="lower"),
    "public_trmean": lambda u, f: trimmed_mean(u, f=f),
    "public_meamed": lambda u, f: meamed(u, f=f),
    "public_phocas": lambda u, f: phocas(u, f=f),
    "public_krum": lambda u, f: multi_krum(u, f=f, variant="garfield"),
    "public_bulyan": lambda u, f: bulyan(u, f=f, variant="garfield"),
    "paper_krum": lambda u, f: krum(u, f=f),
    "paper_multikrum": lambda u, f: multi_krum(u, f=f),
    "paper_bulyan": lambda u, f: bulyan(u, f=f),
    "paper_median": lambda u, f: coordinate_median(u),
    "geometric_median": lambda u, f: geometric_median(u),
}


@pytest.mark.parametrize("name", ROBUST)
def test_the_other_rules_reproduce_their_golden_arrays(name: str) -> None:
    z = golden("robust_n7")
    for dtype, atol in ((np.float64, 1e-10), (np.float32, 1e-5)):
        out = ROBUST[name](z["updates"].astype(dtype), int(z["f"]))
        np.testing.assert_allclose(out, z[name], rtol=0, atol=1e-6 if name == "geometric_median" else atol)


# -- the other rules by hand --------------------------------------------------------------------------------------

LINE = np.array([[0.0], [1.0], [2.0], [4.0], [100.0]])


def test_rules_on_five_numbers_by_hand() -> None:
    assert coordinate_median(LINE) == [2]
    assert coordinate_median(LINE[:4]) == [1.5] and coordinate_median(LINE[:4], even="lower") == [1]
    assert trimmed_mean(LINE, f=1) == pytest.approx([7 / 3])
    assert meamed(LINE, f=1) == [7 / 4]
    assert phocas(LINE, f=1) == [7 / 4]
    assert krum(LINE, f=1) == [1]  # scores over 2 neighbours: 5, 2, 5, 13, ...
    assert multi_krum(LINE, f=1, m=3) == [1]
    assert norm_clip(LINE) == [(0 + 1 + 2 + 2 + 2) / 5]
    assert geometric_median(LINE) == pytest.approx([2], abs=1e-6)
    assert mean(LINE, [1, 0, 0, 3, 0]) == [3]
    assert norm_clip(LINE, [0, 0, 0, 1, 1]) == [2]


def test_the_geometric_median_weighs() -> None:
    corner = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(geometric_median(corner, [2.5, 1, 1]), [0, 0], atol=1e-6)
    fermat = (3 - np.sqrt(3)) / 6  # all angles 120 degrees
    np.testing.assert_allclose(geometric_median(corner), [fermat, fermat], atol=1e-9)


def test_variants_of_krum_differ_as_documented() -> None:
    u = draw(11, 30, seed=3)
    d2 = ((u[:, None] - u[None]) ** 2).sum(-1)
    for variant, table, nearest, m in (
        ("canonical", d2, 7, 7),
        ("garfield", np.sqrt(d2), 8, 7),
        ("byzfl", d2, 8, 9),
    ):
        scores = np.sort(table, axis=1)[:, 1 : nearest + 1].sum(1)
        best = np.argsort(scores)[:m]
        np.testing.assert_allclose(multi_krum(u, f=2, variant=variant), u[best].mean(0), atol=1e-12)
        np.testing.assert_array_equal(krum(u, f=2, variant=variant), u[best[0]])


# -- what all rules share -----------------------------------------------------------------------------------------


@each_rule
def test_whatever_holds_the_updates_the_result_is_the_same(rule: Callable[..., Any], tmp_path: Path) -> None:
    u = draw(11, 37)
    expected = rule(u)
    assert isinstance(expected, np.ndarray) and expected.shape == (37,) and expected.dtype == np.float64
    saved = np.memmap(tmp_path / "u.dat", dtype=np.float64, mode="w+", shape=u.shape)
    saved[:] = u
    saved.flush()
    mapped = np.memmap(tmp_path / "u.dat", dtype=np.float64, mode="r", shape=u.shape)
    frozen = u.copy()
    frozen.flags.writeable = False
    before = u.copy()
    for held in (mapped, list(mapped), list(u), tuple(u), np.asfortranarray(u), frozen, u[:, ::-1][:, ::-1]):
        out = rule(held)
        assert isinstance(out, np.ndarray)
        np.testing.assert_array_equal(out, expected)
    for tensors in (torch.tensor(u), list(torch.tensor(u)), torch.tensor(u, requires_grad=True)):
        out = rule(tensors)
        assert isinstance(out, torch.Tensor) and not out.requires_grad
        np.testing.assert_array_equal(out.numpy(), expected)
    single = rule(torch.tensor(u, dtype=torch.float32))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(u, before)


@each_rule
def test_pieces_of_any_size_give_the_same_result(
    rule: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    u = draw(11, 500)
    whole = rule(u)
    spans = Rows.spans
    monkeypatch.setattr(Rows, "spans", lambda self, piece=0: spans(self, 11 * 64))
    monkeypatch.setattr("strategies.aggregators.rows.PIECE", 11 * 64)
    monkeypatch.setattr("strategies.aggregators.rows.LONG", 128)
    np.testing.assert_allclose(rule(u), whole, rtol=0, atol=1e-11)


@each_rule
def test_no_rule_holds_more_than_a_piece_at_a_time(
    rule: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    given = Rows._given

    def spy(self: Rows, *where: Any) -> torch.Tensor:
        out = given(self, *where)
        sizes.append(out.untyped_storage().nbytes() // 8)
        return out

    monkeypatch.setattr(Rows, "_given", spy)
    rule(torch.randn(11, 60_000))
    assert max(sizes) <= PIECE < 11 * 60_000


@pytest.mark.parametrize("kind", [torch.Tensor.clone, list, torch.Tensor.numpy])
def test_a_sum_of_rows_is_that_of_a_product_bit_for_bit(kind: Callable[[torch.Tensor], Any]) -> None:
    """Rows are added one after the other, however few of them are read at once."""
    u = torch.randn(23, 40_000, generator=torch.Generator().manual_seed(2))
    u[:, ::5] = -0.0
    w = torch.rand(23, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out = torch.as_tensor(mean(kind(u), w))
    assert out.numpy().tobytes() == ((w / w.sum()) @ u.double()).float().numpy().tobytes()


def test_a_mean_whose_sum_overflows_is_still_one_of_all_rows() -> None:
    u, report = torch.full((3, 40), 3e37), {}
    assert torch.equal(mean(u, report=report), u[0])
    assert report["dropped"] == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_rule
def test_rows_that_are_not_finite_are_left_out_and_reported(rule: Callable[..., Any], bad: float) -> None:
    u = draw(13)
    broken = u.copy()
    broken[4, 7], broken[9, 0] = bad, np.nan
    report: dict[str, Any] = {}
    out = rule(broken, report=report)
    np.testing.assert_allclose(out, rule(np.delete(u, [4, 9], axis=0)), rtol=0, atol=1e-11)
    assert report["dropped"] == [4, 9]
    for name in ("coefficients", "explained"):
        if name in report:
            assert len(report[name]) == 13 and report[name][4] == 0
    if "selected" in report:
        assert not {4, 9} & set(report["selected"])
    with pytest.warns(UserWarning, match=r"rows \[4, 9\] are not finite and were left out"):
        rule(broken)


@each_rule
def test_if_no_row_is_finite_nothing_moves(rule: Callable[..., Any]) -> None:
    report: dict[str, Any] = {}
    np.testing.assert_array_equal(rule(draw() * np.nan, report=report), np.zeros(40))
    assert report["dropped"] == list(range(11))


@each_rule
def test_finite_rows_make_no_noise(rule: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(draw())


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: krum(draw(6), f=2), r"krum: f=2 needs n >= 2f \+ 3 = 7 updates, got 6"),
        (lambda: multi_krum(draw(8), f=3), r"multi_krum: f=3 needs n >= 2f \+ 3 = 9 updates, got 8"),
        (lambda: bulyan(draw(10), f=2), r"bulyan: f=2 needs n >= 4f \+ 3 = 11 updates, got 10"),
        (lambda: trimmed_mean(draw(4), f=2), r"trimmed_mean: f=2 needs n >= 2f \+ 1 = 5 updates, got 4"),
        (lambda: meamed(draw(4), f=2), r"meamed: f=2 needs n >= 2f \+ 1"),
        (lambda: phocas(draw(4), f=2), r"phocas: f=2 needs n >= 2f \+ 1"),
        (lambda: krum(draw(), f=-1), r"f=-1 must be a whole number"),
        (lambda: krum(draw(), f=1.5), r"f=1.5 must be a whole number"),
        (lambda: krum(draw(), f=1, variant="paper"), r"variant='paper', choose one of canonical, garfield"),
        (lambda: multi_krum(draw(), f=2, m=12), r"m=12 must be between 1 and n = 11"),
        (lambda: coordinate_median(draw(), even="upper"), r"even='upper', choose one of average, lower"),
        (lambda: flag(draw(), scale="norm"), r"scale='norm', choose one of median_norm, unit, raw"),
        (lambda: flag(draw(), pairs="both"), r"pairs='both', choose one of code, paper"),
        (lambda: flag(draw(), m=0), r"m=0 must be a whole number, at least 1"),
        (lambda: flag(draw(), iterations=0), r"iterations=0 must be a whole number, at least 1"),
        (lambda: flag(draw(), lam=-1), r"lam=-1 must not be negative"),
        (lambda: flag(draw(), m=2.0), r"m=2.0 must be a whole number"),
        (lambda: flag(draw(), lam=np.inf), r"lam must be finite"),
        (lambda: flag(draw(), start=np.eye(3)), r"start has shape \(3, 3\), expected \(40, m\)"),
        (lambda: geometric_median(draw(), nu=0), r"nu > 0"),
        (lambda: mean(np.zeros((0, 3))), r"mean of no updates"),
        (lambda: mean([]), r"mean of no updates"),
        (
            lambda: mean(np.zeros(3)),
            r"expected updates of shape \(n, d\) or a list of vectors, got shape \(3,\)",
        ),
        (lambda: flag([np.zeros(3), np.zeros(4)]), r"vectors of one length"),
        (lambda: mean(LINE, [1, 1]), r"weights must be 5 non-negative numbers"),
        (lambda: krum(LINE, [1, 1, 1, 1, -1], f=1), r"weights must be 5 non-negative"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert isinstance(caught.value, ConfigError)


def test_whole_numbers_may_have_any_integer_type() -> None:
    u = draw()
    np.testing.assert_array_equal(krum(u, f=np.array(2)), krum(u, f=2))
    np.testing.assert_array_equal(
        flag(u, m=np.int64(3), iterations=np.int32(2), lam=np.array(2.0)), flag(u, m=3, iterations=2, lam=2.0)
    )


def test_rows_dropped_as_not_finite_count_among_the_wrong_ones_where_few_are_left() -> None:
    u = draw(11)
    u[0, 0] = np.nan
    np.testing.assert_allclose(bulyan(u, f=2, report={}), bulyan(u[1:], f=1), atol=1e-12)
    few = np.vstack([u[1:4], np.full((2, 40), np.nan)])
    with pytest.raises(
        ValueError, match=r"f=3 needs n >= 4f \+ 3 = 15 updates, got 3 \(2 more were not finite\)"
    ):
        bulyan(few, f=3, report={})


# -- in the simulator ---------------------------------------------------------------------------------------------


def test_every_rule_has_its_option() -> None:
    conf = Path(aggregators.__file__).parents[2] / "conf/aggregator"
    assert sorted(p.stem for p in conf.glob("*.yaml")) == list(aggregators.RULES)


def test_krum_names_the_client_it_chose() -> None:
    problem = classification(cohorts=[[0, 1, 2, 4, 5]] * 2)
    result = problem.run("strategy=fedavg", "aggregator=krum", "aggregator.f=1", "rounds=2")
    chosen = [row["aggregator"]["selected"] for row in result.rows]
    assert all(len(c) == 1 and c[0] in (0, 1, 2, 4, 5) for c in chosen)


def test_an_impossible_f_is_refused_with_the_inequality() -> None:
    with pytest.raises(ConfigError, match=r"krum needs 2f \+ 3 = 5 updates, clients_per_round=3 gives 3"):
        classification().run("strategy=fedavg", "aggregator=krum", "aggregator.f=1")
    with pytest.raises(ConfigError, match=r"aggregator.f: has no value; add aggregator.f=VALUE"):
        classification().run("strategy=fedavg", "aggregator=krum")
