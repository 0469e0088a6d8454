"""The flag aggregator: golden arrays, by hand, and in the simulator."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from problems import classification, hashes
from rules import draw, golden

from strategies.aggregators import (
    flag,
)

CASES = ("n15_random", "n20_d6", "n7_lam4")


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_flag_reproduces_the_public_code(case: str, steps: int) -> None:
    z = golden(case)
    options = {"m": int(z["m"]), "lam": float(z["lam"]), "iterations": steps, "scale": "unit"}
    report: dict[str, Any] = {}
    out = flag(z["updates"], start=z["Y0"], report=report, **options)
    np.testing.assert_allclose(out, z[f"out_{steps}it"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(report["objective"], z[f"objective_{steps}it"], rtol=0, atol=1e-9)
    unit = z["updates"] / np.linalg.norm(z["updates"], axis=1, keepdims=True)
    explained = np.diag(z[f"proj_{steps}it"])
    np.testing.assert_allclose(report["explained"], explained, rtol=0, atol=1e-9)
    np.testing.assert_allclose(unit @ out * int(z["m"]), z[f"proj_{steps}it"].sum(1), rtol=0, atol=1e-8)
    single = flag(z["updates"].astype(np.float32), start=z["Y0_f32"], **options)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, z[f"out_{steps}it_f32"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("pairs", ["code", "paper"])
@pytest.mark.parametrize("scale", ["unit", "raw"])
@pytest.mark.parametrize("case", CASES)
def test_flag_reproduces_the_oracle_from_the_flag_mean(case: str, scale: str, pairs: str, steps: int) -> None:
    z = golden(case)
    out = flag(
        torch.tensor(z["updates"]),
        m=int(z["m"]),
        lam=float(z["lam"]),
        iterations=steps,
        scale=scale,
        pairs=pairs,
    )
    np.testing.assert_allclose(out, z[f"oracle_{scale}_{pairs}_{steps}it"], rtol=0, atol=1e-10)


def test_m_defaults_to_half_of_the_finite_updates() -> None:
    u = draw(9)
    np.testing.assert_array_equal(flag(u), flag(u, m=5))
    u[3, 2] = np.inf
    np.testing.assert_allclose(
        flag(u, report={}), flag(np.delete(u, 3, axis=0), m=5), rtol=0, atol=1e-12
    )  # 8 rows: ceil(9 / 2)


def test_flag_keeps_a_start_that_no_step_improves() -> None:
    u = np.eye(3, 6)
    start = np.linalg.qr(np.eye(6)[:, :3])[0]  # explains everything already
    report: dict[str, Any] = {}
    out = flag(u, m=3, start=start, scale="raw", report=report)
    np.testing.assert_allclose(out, u.mean(0), atol=1e-12)


def test_flag_of_one_update() -> None:
    u = draw(1, 20)
    np.testing.assert_allclose(flag(u, scale="raw"), u[0], atol=1e-12)
    np.testing.assert_allclose(flag(u, scale="unit"), u[0] / np.linalg.norm(u), atol=1e-12)
    np.testing.assert_allclose(flag(u, lam=2.0), u[0], atol=1e-12)


@pytest.mark.parametrize("pairs", ["code", "paper"])
def test_flag_bears_duplicates_and_zero_updates(pairs: str) -> None:
    u = draw(8, 40)
    u[2], u[5] = u[1], 0
    for lam in (0.0, 4.0):
        report: dict[str, Any] = {}
        out = flag(u, lam=lam, pairs=pairs, report=report)
        assert np.isfinite(out).all() and np.linalg.norm(out) > 0.1
        assert report["explained"][5] < 1e-20
        assert report["coefficients"][1] == pytest.approx(report["coefficients"][2])
    np.testing.assert_array_equal(flag(0 * u), np.zeros(40))


def test_more_dimensions_than_rank_change_only_the_unit_scale() -> None:
    u = draw(5, 40)
    np.testing.assert_allclose(flag(u, m=50, scale="raw"), u.mean(0), atol=1e-12)
    np.testing.assert_allclose(flag(u, m=50, scale="unit") * 10, flag(u, m=5, scale="unit"), atol=1e-12)


def test_flag_diagnostics_are_in_the_log() -> None:
    result = classification().run("strategy=fedavg", "aggregator=flag", "aggregator.iterations=2")
    rows = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        told = row["aggregator"]
        assert told["clients"] == row["cohort"] and told["dropped"] == []
        assert len(told["coefficients"]) == len(told["explained"]) == 3
        assert told["iterations"] <= 2


def test_raw_flag_that_keeps_every_dimension_is_fedavg() -> None:
    settings = ("strategy=fedavg", "strategy.weighting=uniform", "dtype=float64")
    flagged = classification().run(*settings, "aggregator=flag", "aggregator.scale=raw", "aggregator.m=3")
    averaged = classification().run(*settings)
    assert hashes(flagged) != hashes(averaged)  # another order of sums
    for name, value in averaged.weights.items():
        torch.testing.assert_close(flagged.weights[name], value, rtol=0, atol=1e-13)
