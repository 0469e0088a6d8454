"""FedSpeed against its specification: golden trajectories, every option, lost clients.

Numbers come from the authors' code (golden arrays) or from ``reference.py``, an independent float64 computation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from golden_quadratic import COHORTS, GRADIENTS, Z, close
from problems import (
    Problem,
    hashes,
    quadratic,
    recorded,
)

from fedsim.errors import ConfigError

ENGINES = ["serial", pytest.param("ray", marks=pytest.mark.slow)]


def reference_run(**options: Any) -> reference.Trace:
    return reference.fedspeed(GRADIENTS, Z["x0"], options.pop("cohorts", COHORTS), **options)


def two_engines(engine: str, request: pytest.FixtureRequest) -> list[str]:
    return ["engine=serial"] if engine == "serial" else [request.getfixturevalue("ray"), "engine.workers=2"]


# -- golden trajectories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_fedspeed_follows_the_authors_code_round_by_round(
    engine: str, request: pytest.FixtureRequest
) -> None:
    run, result = recorded("fedspeed", quadratic(), *two_engines(engine, request))
    close(run.series("w"), Z["fedspeed_x"])
    close(run.of_clients("h", 6), Z["fedspeed_h"])
    close(run.series("hbar"), Z["fedspeed_h"].mean(1))
    close(result.weights["x"], Z["fedspeed_x"][-1])


@pytest.mark.parametrize("engine", ENGINES)
def test_fedavg_follows_the_authors_code_round_by_round(engine: str, request: pytest.FixtureRequest) -> None:
    run, result = recorded("fedavg", quadratic(), *two_engines(engine, request))
    close(run.series("w"), Z["fedavg_x"])
    close(result.weights["x"], Z["fedavg_x"][-1])


@pytest.mark.parametrize("name", ["fedspeed", "fedavg"])
def test_float32_trajectory(name: str) -> None:
    run, result = recorded(name, quadratic(), "dtype=float32")
    assert run.states[0]["w"].dtype == torch.float32
    close(run.series("w"), Z[f"{name}_x"], atol=1e-5)
    close(run.series("w"), Z[f"{name}_x_f32"], atol=5e-6)
    assert result.weights["x"].dtype == torch.float32


def test_local_models_are_those_of_the_authors_code() -> None:
    run, _ = recorded("fedspeed", quadratic())
    before = np.concatenate([Z["x0"][None], run.series("w")[:-1]])
    h = run.of_clients("h", 6)
    moved = np.diff(np.concatenate([np.zeros((1, 4, 6)), h]), axis=0)  # x_K - x, 0 for inactive clients
    active = Z["active"]
    close((before[:, None] + moved)[active], Z["fedspeed_xK"][active])
    assert not moved[~active].any()  # absent clients keep their dual, bit for bit


def test_the_reference_itself_reproduces_the_golden_arrays() -> None:
    close(reference_run().x, Z["fedspeed_x"])
    close(reference_run().h, Z["fedspeed_h"])
    close(reference.fedavg(GRADIENTS, Z["x0"], COHORTS).x, Z["fedavg_x"])


def test_clipping_is_logged_and_bites_in_14_of_128_steps() -> None:
    _, result = recorded("fedspeed", quadratic())
    table = result.per_client
    share = table[table.metric == "clipped"].value
    steps = table[table.metric == "steps"].value
    assert steps.tolist() == [8.0] * 16
    assert round(float((share * 8).sum())) == 14


# -- the options of section 6 -------------------------------------------------------------------------------------


OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "active duals": (["strategy.dual_mean=active"], {"dual_mean": "active"}),
    "alpha one half": (["strategy.alpha=0.5"], {"alpha": 0.5}),
    "alpha 15/16": (["strategy.alpha=0.9375"], {"alpha": 0.9375}),
    "ascent not normalised": (
        ["strategy.normalize=false", "strategy.rho=0.05"],
        {"normalize": False, "rho": 0.05},
    ),
    "radius": (["strategy.rho=0.7"], {"rho": 0.7}),
    "prox weight": (["strategy.lamb=0.5"], {"lamb": 0.5}),
    "clip the gradient alone": (
        ["client.clip=loss", "client.clip_norm=2"],
        {"clip": "loss", "clip_norm": 2.0},
    ),
    "clip the whole step": (["client.clip=full", "client.clip_norm=2"], {"clip": "full", "clip_norm": 2.0}),
    "clip the direction": (["client.clip_norm=2"], {"clip_norm": 2.0}),
    "no clipping": (["client.clip_norm=null"], {"clip_norm": None}),
    "no weight decay": (["client.weight_decay=0"], {"weight_decay": 0.0}),
    "weight decay": (["client.weight_decay=0.05"], {"weight_decay": 0.05}),
    "decay of the learning rate": (["client.lr_decay=0.9", "client.lr=0.05"], {"lr_decay": 0.9, "lr": 0.05}),
    "momentum": (["client.momentum=0.5", "client.lr=0.05"], {"momentum": 0.5, "lr": 0.05}),
    "momentum, clip the whole step": (
        ["client.momentum=0.5", "client.lr=0.05", "client.clip=full", "client.clip_norm=2"],
        {"momentum": 0.5, "lr": 0.05, "clip": "full", "clip_norm": 2.0},
    ),
    "relaxed start": (["strategy.beta=0.3"], {"beta": 0.3}),
    "relaxed start, active duals": (
        ["strategy.beta=0.3", "strategy.dual_mean=active"],
        {"beta": 0.3, "dual_mean": "active"},
    ),
    "fewer epochs": (["client.epochs=1"], {"epochs": 1}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_the_reference(option: str) -> None:
    overrides, options = OPTIONS[option]
    run, _ = recorded("fedspeed", quadratic(), *overrides)
    expected = reference_run(**options)
    close(run.series("w"), expected.x)
    close(run.of_clients("h", 6), expected.h)
    if options.get("dual_mean") != "active":
        close(run.series("hbar"), expected.hbar)
    assert np.abs(np.array(expected.x) - Z["fedspeed_x"]).max() > 1e-4  # the option does something


def test_dual_mean_of_all_and_active_agree_when_everybody_takes_part() -> None:
    everybody = quadratic(cohorts=[range(4)] * 6)
    over_all, _ = recorded("fedspeed", everybody)
    active, _ = recorded("fedspeed", everybody, "strategy.dual_mean=active")
    close(over_all.series("w"), active.series("w"))


def test_dual_mean_of_all_and_active_differ_under_partial_participation() -> None:
    over_all, _ = recorded("fedspeed", quadratic())
    active, _ = recorded("fedspeed", quadratic(), "strategy.dual_mean=active")
    gap = np.abs(over_all.series("w") - active.series("w")).max(1)
    assert gap[0] < 1e-12  # round 1: everybody
    assert (gap[1:] > 1e-3).all()


@pytest.mark.parametrize("off", ["strategy.alpha=0", "strategy.rho=0"])
def test_without_ascent_fedspeed_is_feddyn(off: str) -> None:
    run, _ = recorded("fedspeed", quadratic(), off, "client.clip_norm=null")
    close(run.series("w"), reference.feddyn(GRADIENTS, Z["x0"], COHORTS).x)


@pytest.mark.parametrize("off", ["strategy.alpha=0", "strategy.rho=0"])
def test_without_ascent_fedspeed_is_the_authors_feddyn_clipping_included(off: str) -> None:
    run, _ = recorded("fedspeed", quadratic(), off)
    close(run.series("w"), Z["feddyn_x"])
    close(run.of_clients("h", 6), Z["feddyn_h"])


def test_with_next_to_no_prox_and_zero_duals_local_models_are_those_of_fedsam() -> None:
    run, _ = recorded("fedspeed", quadratic(), "strategy.lamb=1e-300", "rounds=1")
    close(run.of_clients("h", 6)[0], Z["fedsam_xK"][0] - Z["x0"])


def test_weighting_by_samples() -> None:
    """Clients of 2, 4, 6 and 8 samples: the mean of local models is weighted, the mean dual never is."""
    sizes = [1, 2, 3, 4]
    clients = [
        (torch.tensor(np.tile(a, (k, 1, 1))), torch.tensor(np.tile(b, (k, 1))))
        for a, b, k in zip(Z["A"], Z["b"], sizes, strict=True)
    ]
    gradients = [g * k for g, k in zip(GRADIENTS, sizes, strict=True)]
    problem = quadratic(clients=clients)
    for overrides, options in (
        (["strategy.weighting=samples"], {"weights": [2, 4, 6, 8]}),
        (["strategy.weighting=uniform"], {"weights": None}),
        (["strategy.weighting=samples", "strategy.beta=0.2"], {"weights": [2, 4, 6, 8], "beta": 0.2}),
        (
            ["strategy.weighting=samples", "strategy.dual_mean=active"],
            {"weights": [2, 4, 6, 8], "dual_mean": "active"},
        ),
    ):
        run, _ = recorded("fedspeed", problem, "client.epochs=1", *overrides)
        expected = reference.fedspeed(gradients, Z["x0"], COHORTS, epochs=1, **options)
        close(run.series("w"), expected.x)
        close(run.of_clients("h", 6), expected.h)


def test_fedavg_weighting_server_step_and_momentum() -> None:
    sizes = [1, 2, 3, 4]
    clients = [
        (torch.tensor(np.tile(a, (k, 1, 1))), torch.tensor(np.tile(b, (k, 1))))
        for a, b, k in zip(Z["A"], Z["b"], sizes, strict=True)
    ]
    gradients = [g * k for g, k in zip(GRADIENTS, sizes, strict=True)]
    overrides = ["client.epochs=1", "strategy.server_lr=0.7", "client.momentum=0.9", "client.lr=0.03"]
    options: dict[str, Any] = {"epochs": 1, "server_lr": 0.7, "momentum": 0.9, "lr": 0.03}
    for weighting, weights in (("samples", [2, 4, 6, 8]), ("uniform", None)):
        run, _ = recorded("fedavg", quadratic(clients=clients), f"strategy.weighting={weighting}", *overrides)
        expected = reference.fedavg(gradients, Z["x0"], COHORTS, weights=weights, **options)
        close(run.series("w"), expected.x)


def test_bernoulli_participation_keeps_the_invariant() -> None:
    problem = replace(quadratic(), cohorts=None)
    settings = ["participation=bernoulli", "clients_per_round=2", "rounds=12"]
    run, result = recorded("fedspeed", problem, *settings)
    cohorts = [row["cohort"] for row in result.rows]
    assert len({len(c) for c in cohorts}) > 1  # sizes vary ...
    assert min(map(len, cohorts)) >= 1  # ... and nobody is never the answer
    expected = reference_run(cohorts=cohorts)
    close(run.series("w"), expected.x)
    close(run.series("hbar"), run.of_clients("h", 6).mean(1))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("strategy.lamb=0", "strategy.lamb=0"),
        ("strategy.rho=-0.1", "strategy.rho=-0.1"),
        ("strategy.alpha=1.5", "strategy.alpha=1.5"),
        ("strategy.dual_mean=some", "strategy.dual_mean=some"),
        ("strategy.weighting=size", "strategy.weighting=size"),
    ],
)
def test_impossible_options_are_refused_by_name(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        quadratic().run("strategy=fedspeed", override)


# -- section 7: lost clients --------------------------------------------------------------------------------------


def poisoned(clients: list[int]) -> Problem:
    """The golden problem in which the right-hand sides of ``clients`` are NaN."""
    b = [torch.tensor(v) * (float("nan") if i in clients else 1.0) for i, v in enumerate(Z["b"])]
    pairs = [(torch.tensor(a), bi) for a, bi in zip(Z["A"], b, strict=True)]
    return quadratic(clients=pairs)


def test_a_nonfinite_client_counts_as_lost() -> None:
    """Its dual stays zero and S shrinks: as if it had not been in the cohort, while m still counts it."""
    run, result = recorded("fedspeed", poisoned([2]))
    without = [[c for c in cohort if c != 2] for cohort in COHORTS]
    expected = reference_run(cohorts=without)
    close(run.series("w"), expected.x)
    close(run.of_clients("h", 6), expected.h)
    assert not run.of_clients("h", 6)[:, 2].any()
    close(run.series("hbar"), run.of_clients("h", 6).mean(1))
    named = [(r["round"], f["client"], f["kind"]) for r in result.rows for f in r["failures"]]
    assert named == [(t + 1, 2, "nonfinite") for t, cohort in enumerate(COHORTS) if 2 in cohort]


def test_if_nobody_answers_the_model_stays_and_hbar_is_not_added_again() -> None:
    """Round 3 is client 1 alone."""
    run, result = recorded("fedspeed", poisoned([1]))
    w, hbar = run.series("w"), run.series("hbar")
    assert COHORTS[2] == [1]
    assert (w[2] == w[1]).all()
    assert (hbar[2] == hbar[1]).all()
    assert np.abs(hbar[1]).max() > 0  # adding it again would show
    assert hashes(result)[2] == hashes(result)[1]
    expected = reference_run(cohorts=[[c for c in cohort if c != 1] for cohort in COHORTS])
    close(w, expected.x)


def test_clients_without_data_contribute_nothing_and_keep_no_dual() -> None:
    z = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(Z["A"], Z["b"], strict=True)]
    z[3] = (z[3][0][:0], z[3][1][:0])
    run, result = recorded("fedspeed", quadratic(clients=z))
    expected = reference_run(cohorts=[[c for c in cohort if c != 3] for cohort in COHORTS])
    close(run.series("w"), expected.x)
    assert all(not kept[3] for kept in run.kept)
    assert {(f["client"], f["kind"]) for r in result.rows for f in r["failures"]} == {(3, "refused")}


def test_without_any_data_the_model_stays() -> None:
    empty = [(torch.tensor(Z["A"][0][:0]), torch.tensor(Z["b"][0][:0]))] * 4
    run, _ = recorded("fedspeed", quadratic(clients=empty))
    close(run.series("w"), np.tile(Z["x0"], (6, 1)), atol=0)
