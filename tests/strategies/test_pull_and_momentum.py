"""Where local options meet a rule: a clipped step with a proximal pull, local momentum in what is read back from steps.

Loops in float64 over the golden quadratics; no step is taken from the code under test.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden_quadratic import COHORTS, GRADIENTS, Z, close
from problems import Problem, classification, linear_loss, network, quadratic, recorded
from reference import clipped

from fedsim.errors import ConfigError

Vector = np.ndarray
SGD = ("client=sgd", "client.lr=0.1", "client.epochs=4", "client.batch_size=1", "client.shuffle=false")
DECAY, BOUND = 0.01, 2.0
CLIPPED = (*SGD, f"client.weight_decay={DECAY}", f"client.clip_norm={BOUND}")
ZERO = "rounds=1", "clients_per_round=1", *CLIPPED[:5], "dtype=float64", "client.clip_norm=10"


def descend(i: int, x: Vector, direction: Callable[[Vector, Vector], Vector], decay: float = 0.0) -> Vector:
    """Client i's eight steps from ``x``: ``w <- w - lr (direction(g, w) + decay w)``."""
    w = x.copy()
    for k in range(8):
        w = w - 0.1 * (direction(GRADIENTS[i][k % 2](w), w) + decay * w)
    return w


@pytest.mark.parametrize("form", ["whole", "split", "loss", "full"])
def test_what_is_clipped_of_fedproxs_step(form: str) -> None:
    """The whole direction, the gradient alone or the whole step; ``split``, the FedSpeed authors', cuts the pull."""
    option = {"whole": "clip=direction", "split": "clip_pull=split"}.get(form, f"clip={form}")
    run, _ = recorded("fedprox", quadratic(), "strategy.mu=1", *CLIPPED, f"client.{option}")
    x = Z["x0"].copy()
    for t, cohort in enumerate(COHORTS):
        forms: dict[str, Callable[[Vector, Vector], Vector]] = {
            "whole": lambda g, w, x=x: clipped(g + (w - x), BOUND) + DECAY * w,
            "split": lambda g, w, x=x: clipped(g - x, BOUND) + w + DECAY * w,
            "loss": lambda g, w, x=x: clipped(g, BOUND) + (w - x) + DECAY * w,
            "full": lambda g, w, x=x: clipped(g + (w - x) + DECAY * w, BOUND),
        }
        x = np.mean([descend(i, x, forms[form]) for i in cohort], 0)
        close(run.series("w")[t], x, 1e-12)


def test_dittos_personal_steps_are_clipped_whole_and_counted() -> None:
    run, result = recorded("ditto", quadratic(), "strategy.lam=1", *CLIPPED, "client.clip_pull=split")
    x, v, bitten = Z["x0"].copy(), {}, []
    for t, cohort in enumerate(COHORTS):
        for i in cohort:
            count = 0

            def bounded(g: Vector, w: Vector, x: Vector = x) -> Vector:
                nonlocal count
                count += np.linalg.norm(g + w - x) > BOUND
                return clipped(g + w - x, BOUND)

            v[i] = descend(i, v.get(i, x), bounded, DECAY)
            bitten.append(count / 8)
            close(run.kept[t][i]["v"], v[i], 1e-12)
        x = np.mean([descend(i, x, lambda g, w: clipped(g, BOUND), DECAY) for i in cohort], 0)
        close(run.series("w")[t], x, 1e-12)
    table = result.per_client
    found = table[table.metric == "personal/clipped"].sort_values(["round", "client"]).value
    assert found.tolist() == bitten and 0 < sum(bitten) < len(bitten)


@pytest.mark.parametrize(
    ("name", "option"), [("fedprox", "mu"), ("ditto", "lam"), ("feddyn", "alpha"), ("fedspeed", "lamb")]
)
def test_a_long_model_without_gradient_stays_where_it_is(name: str, option: str) -> None:
    """Norm 14.7 and a pull of weight 1: cut in two, the pull would draw it to the bound's 10."""
    still = [(torch.zeros(2, 6, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64))]
    start = torch.full((6,), 6.0, dtype=torch.float64)
    problem = Problem(quadratic().model, still, ZERO, linear_loss, initial={"x": start})
    run, result = recorded(name, problem, f"strategy.{option}=1")
    close(result.weights["x"], start, 0)
    if name == "ditto":
        close(run.kept[0][0]["v"], start, 0)
    shrunk, _ = recorded(name, problem, f"strategy.{option}=1", "client.clip_pull=split")
    norm = float(np.linalg.norm(shrunk.kept[0][0]["v"] if name == "ditto" else shrunk.series("w")[-1]))
    assert (norm > 14) if name == "ditto" else (norm < 13)


@pytest.mark.parametrize("name", ["fedprox", "ditto", "feddyn"])
def test_without_a_bound_or_without_a_pull_the_option_has_no_say(name: str) -> None:
    for options in (["client.clip_norm=null"], ["client.clip=loss"], ["client.clip=full"]):
        one, other = (
            quadratic().run(f"strategy={name}", *CLIPPED, *options, f"client.clip_pull={form}")
            for form in ("whole", "split")
        )
        assert one.rows[-1]["weights_hash"] == other.rows[-1]["weights_hash"]


# -- local momentum ----------------------------------------------------------------------------------------------

HEAVY = 0.9
MOVING = (*SGD, f"client.momentum={HEAVY}")


def with_momentum(i: int, x: Vector, direction: Callable[[Vector], Vector]) -> tuple[Vector, Vector]:
    """Client i's heavy-ball steps along ``direction(g)``: the end, and the mean of ``direction`` as it entered.

    A step's direction moves the weights in every later step too, by 1, m, m^2, ...: it enters as often as the sum.
    """
    w, speed, entered, parts = x.copy(), np.zeros_like(x), np.zeros(8), []
    for k in range(8):
        parts.append(direction(GRADIENTS[i][k % 2](w)))
        speed = HEAVY * speed + parts[-1]
        w = w - 0.1 * speed
        for j in range(k + 1):
            entered[j] += HEAVY ** (k - j)
    return w, np.average(parts, axis=0, weights=entered)


def test_scaffolds_control_variates_are_mean_gradients_under_momentum() -> None:
    run, _ = recorded("scaffold", quadratic(), "strategy.option=2", *MOVING)
    x, c, own = Z["x0"].copy(), np.zeros(6), np.zeros((4, 6))
    for t, cohort in enumerate(COHORTS):
        ends, before = [], own.copy()
        for i in cohort:
            w, mean = with_momentum(i, x, lambda g, i=i, c=c, before=before: g - before[i] + c)
            ends.append(w)
            own[i] = mean + before[i] - c
        x, c = np.mean(ends, 0), c + (own - before).sum(0) / 4
        close(run.series("w")[t], x, 1e-9)
        close(run.series("c")[t], c, 1e-9)
        close(run.of_clients("c", 6)[t], own, 1e-9)


@pytest.mark.parametrize("name", ["fedcm", "mofedsam"])
def test_the_global_direction_is_a_mean_direction_under_momentum(name: str) -> None:
    """MoFedSAM without ascent is FedCM."""
    options = ["strategy.rho=0"] if name == "mofedsam" else []
    run, _ = recorded(name, quadratic(), *options, *MOVING)
    x, direction = Z["x0"].copy(), np.zeros(6)
    for t, cohort in enumerate(COHORTS):
        found = [with_momentum(i, x, lambda g, d=direction: 0.1 * g + 0.9 * d) for i in cohort]
        x, direction = np.mean([w for w, _ in found], 0), np.mean([d for _, d in found], 0)
        close(run.series("w")[t], x, 1e-9)
        close(run.series("direction")[t], direction, 1e-9)


def test_fedsgd_refuses_adam_whose_step_is_no_gradient() -> None:
    with pytest.raises(ConfigError, match="FedSGD reads gradients back from the local steps; use client=sgd"):
        classification(model=network()).run("strategy=fedsgd", "client=adam", "client.steps=1")
