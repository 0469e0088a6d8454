"""Rows that the authors' scripts draw from a pool, counted by hand."""

from __future__ import annotations

import torch

from clients.generated import plan_rows


def test_the_authors_filling() -> None:
    """Own rows, then a random draw of the pool up to the total; too many own rows are thinned; none: the first ones."""
    y, n = torch.tensor([0] * 3 + [1] * 9), torch.tensor([12, 12, 12])
    present = torch.tensor([[True] * 3, [True] * 3])
    plan = plan_rows(
        y,
        n,
        target=4,
        present=present,
        per_prototype=5,
        fill="pool",
        total=6,
        rng=torch.Generator().manual_seed(0),
    )
    assert [int((y[plan.kept] == c).sum()) for c in range(3)] == [3, 6, 0]
    assert [int((plan.label == c).sum()) for c in range(3)] == [3, 0, 6]
    assert plan.source[plan.label == 2].tolist() == [-1] * 5 + [-2]
    pool = [0, *[-1] * 5, *[-2] * 5]
    assert all(s in pool for s in plan.source[plan.label == 0].tolist())


def test_the_scripts_pool_holds_as_many_rows_around_own_ones_as_the_target() -> None:
    """n = T = 500, M = 500 around three prototypes, 2000 in all: 1500 of a pool of 2000 rows are drawn, a quarter of
    them, give or take four deviations of the draw (8.4), lie around own rows. With T - n there are none."""
    y, n, present = (
        torch.zeros(500, dtype=torch.int64),
        torch.tensor([2000]),
        torch.ones(3, 1, dtype=torch.bool),
    )
    for fill, around in (("scripts", 375), ("pool", 0)):
        noise = torch.Generator().manual_seed(3)
        plan = plan_rows(
            y, n, target=500, present=present, per_prototype=500, fill=fill, total=2000, rng=noise
        )
        own = plan.source[plan.source >= 0].tolist()
        assert len(plan.kept) == 500 and len(plan) == 1500
        assert abs(len(own) - around) <= (34 if around else 0)
        assert len(set(own)) == len(own)  # one around each at most
    few = plan_rows(y[:3], n, target=4, fill="scripts", total=7, rng=torch.Generator().manual_seed(3))
    assert sorted(few.source.tolist()) == [0, 0, 1, 2] and len(few.kept) == 3
