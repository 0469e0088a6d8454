"""Metrics of single clients that are NaN: named, left out of means, and no obstacle to what was best."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import compose_quickly
from problems import GOLDEN, QUIET, classes, classification, network

import fedsim
from fedsim.exchange.payload import Outcome
from fedsim.run.summary import summarise
from fedsim.server.clientmetrics import over_clients, spread_of, undefined
from fedsim.server.traits import Traits

FOUND = [
    Outcome(c, "ok", metrics={"accuracy": v, "loss": 1.0}) for c, v in enumerate((0.5, math.nan, 1.0, 0.0))
]


def test_means_leave_nan_out() -> None:
    out = over_clients(FOUND, np.array([1, 9, 2, 1]), ["a", "a", "b", "b"])
    assert out["accuracy"] == 0.5 and out["loss"] == 1.0
    assert out["accuracy_weighted"] == pytest.approx((0.5 + 2) / 4)
    assert out["accuracy_std"] == pytest.approx(np.std([0.5, 1.0, 0.0]))
    assert out["accuracy_worst_tenth"] == 0.0
    assert out["domain/a/accuracy"] == 0.5 and out["domain/b/accuracy"] == 0.5
    assert undefined(FOUND) == {"accuracy": [1]}


def test_nobody_left_is_nan() -> None:
    assert math.isnan(over_clients(FOUND[1:2], np.ones(4))["accuracy"])


def test_the_client_is_named_and_best_survives(caplog: pytest.LogCaptureFixture) -> None:
    """The loss of client 1's own test samples is NaN: it alone has four of them."""

    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = torch.nn.functional.cross_entropy(output, y)
        tested = not torch.is_grad_enabled() and len(y) == 4
        return value * float("nan") if tested else value

    settings: list[Any] = ["engine=serial", *QUIET, "rounds=2", "clients_per_round=6", "evaluation.every=1"]
    settings += ["evaluation.clients_every=1", "evaluation.holdout=0.34"]
    sizes = (7, 12, 3, 10, 6, 9)  # 2, 4, 1, 3, 2 and 3 samples held out
    test = classes((11,), seed=1)[0]
    result = fedsim.simulate(settings, model=network(), clients=classes(sizes), test=test, loss=loss)
    row, table = result.rows[-1], result.per_client
    assert row["nan"] == {"evaluate/loss": [1]}
    assert "round 2: evaluate/loss of client 1 is NaN" in caplog.text
    each = table[(table.metric == "evaluate/loss") & (table["round"] == 2)].set_index("client").value
    assert each.isna().tolist() == [False, True, False, False, False, False]
    assert row["clients/loss"] == pytest.approx(each.dropna().mean())


def test_best_survives_rounds_without_a_number() -> None:
    rows = [
        {"accuracy": v, "loss": w, "weights_hash": "h"}
        for v, w in ((0.5, 2.0), (math.nan, math.nan), (0.25, 3.0))
    ]
    start = SimpleNamespace(hash=lambda layout: "s")
    server = SimpleNamespace(facts={}, validator=None, test_size=10, start=start, layout=None)
    method = SimpleNamespace(traits=Traits())
    loop: Any = SimpleNamespace(stopped="", history=rows, done=3, key="k", server=server, strategy=method)
    data: Any = SimpleNamespace(dealt=SimpleNamespace(hash=lambda: "p"), label_skew=None)
    out = summarise(loop, compose_quickly(()), data)
    assert (out["best_accuracy"], out["best_loss"], out["accuracy"]) == (0.5, 2.0, 0.25)


def test_spread_over_clients_as_by_independent_code() -> None:
    with np.load(GOLDEN / "fairness.npz") as z:
        for row, expected in zip(z["stat_in"], z["stat_out"], strict=True):
            found = spread_of(row.tolist())
            for name, value in zip(z["stat_names"], expected, strict=True):
                assert found[name] == pytest.approx(value, abs=1e-5 if name == "angle" else 1e-10), name


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.7] * 5, [0.3]])
def test_equal_clients_are_fair(values: list[float]) -> None:
    found = spread_of(values)
    assert [found[k] for k in ("variance", "gini", "kl")] == pytest.approx([0, 0, 0], abs=1e-15)
    assert found["angle"] < 1e-5
    assert found["worst"] == found["worst_tenth"] == found["best_tenth"] == values[0]


def test_columns_of_fairness_are_there_when_asked_for() -> None:
    settings = ["evaluation.holdout=0.3", "evaluation.clients_every=4", "evaluation.client_validation=0.3"]
    sizes = (20, 24, 16, 12, 20, 28)
    problem = classification(clients=classes(sizes))
    plain, fair = (problem.run(*settings, f"evaluation.fairness={v}") for v in ("false", "true"))
    assert not any(k.endswith("_gini") for k in plain.rows[-1])
    each = fair.per_client.query("metric == 'evaluate/accuracy'").value.tolist()
    row, expected = fair.rows[-1], spread_of(each)
    for name in ("gini", "variance", "worst", "best_tenth", "angle", "kl"):
        assert row[f"clients/accuracy_{name}"] == pytest.approx(expected[name], abs=1e-12)
    assert row["clients/accuracy_worst"] == min(each) and "clients_val/accuracy_worst" in row
    losses = fair.per_client.query("metric == 'evaluate/loss'").value
    assert row["clients/loss_worst"] == losses.max()
    assert plain.rows[-1]["weights_hash"] == row["weights_hash"]
