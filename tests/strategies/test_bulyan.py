"""Bulyan against plain loops over its definition and over the public code's variant."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rules import draw

from strategies.aggregators import bulyan


def test_bulyan_is_its_definition() -> None:
    u = draw(11, 30, seed=4)
    left, picks = list(range(11)), []
    for _ in range(7):
        d2 = ((u[left][:, None] - u[left][None]) ** 2).sum(-1)
        scores = np.sort(d2, axis=1)[:, 1 : max(1, len(left) - 4) + 1].sum(1)
        picks.append(left.pop(int(scores.argmin())))
    s = u[picks]
    near = np.argsort(np.abs(s - np.median(s, axis=0)), axis=0)[:3]
    np.testing.assert_allclose(bulyan(u, f=2), np.take_along_axis(s, near, 0).mean(0), atol=1e-12)


@pytest.mark.parametrize(("n", "f"), [(7, 1), (15, 3), (16, 3)])
def test_garfields_bulyan_is_the_public_code(n: int, f: int) -> None:
    """A plain loop. Over n - f - 1 neighbours n = 15, 16 differ, with the mean of the middle two n = 16."""
    u = np.random.default_rng(n).normal(size=(n, 25))

    def loop(nearest: int, lower: bool) -> list[float]:
        distance = [[math.dist(a, b) for b in u.tolist()] for a in u.tolist()]
        score = [sum(sorted(row)[1 : nearest + 1]) for row in distance]
        order = sorted(range(n), key=score.__getitem__)
        picks = [[u[i] for i in order[k : n - f - 2]] for k in range(n - 2 * f - 2)]
        means = [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in picks]
        out = []
        for column in map(sorted, zip(*means, strict=True)):
            low, high = column[(len(column) - 1) // 2], column[len(column) // 2]
            centre = low if lower else (low + high) / 2
            near = sorted(column, key=lambda v: abs(v - centre))[: len(column) - 2 * f]
            out.append(sum(near) / len(near))
        return out

    found = bulyan(u, f=f, variant="garfield")
    np.testing.assert_allclose(found, loop(n - f - 2, lower=True), rtol=0, atol=1e-12)
    if n > 7:
        assert np.abs(found - loop(n - f - 1, lower=True)).max() > 1e-3
    if n == 16:
        assert np.abs(found - loop(n - f - 2, lower=False)).max() > 1e-3
