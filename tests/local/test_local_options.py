"""Options of local training: vectorised chunks, bfloat16, a target, and those that cannot work."""

from __future__ import annotations

import pytest
import torch
from problems import classification, hashes

from fedsim.errors import ConfigError


def test_chunks_really_run_vectorised_and_differ_by_rounding_at_most() -> None:
    loop, together = (classification().run("client.lr=0.5", f"engine.vectorize={v}") for v in ("off", "on"))
    assert hashes(loop) != hashes(together)
    for k, v in loop.weights.items():
        torch.testing.assert_close(together.weights[k], v, rtol=0, atol=1e-5)


def test_a_model_that_cannot_be_vectorised_runs_in_the_loop() -> None:
    problem = classification("bn", cohorts=[range(6)] * 2)
    with pytest.warns(UserWarning, match="the model has buffers"):
        asked = hashes(problem.run("rounds=2", "engine.vectorize=on"))
    assert asked == hashes(problem.run("rounds=2"))


def test_bfloat16_forward_passes_stay_near_float32() -> None:
    exact, mixed = (classification().run(o) for o in ("client.autocast=null", "client.autocast=bfloat16"))
    gap = max(float((exact.weights[k] - mixed.weights[k]).abs().max()) for k in exact.weights)
    assert 0 < gap < 0.05
    assert all(v.dtype == torch.float32 for v in mixed.weights.values())


def test_a_run_stops_at_its_target() -> None:
    settings = ("evaluation.every=1", "rounds=20", "client.lr=0.5")
    whole = classification().run(*settings)
    best = max(row["accuracy"] for row in whole.rows)
    first = next(row["round"] for row in whole.rows if row["accuracy"] == best)
    stop = (f"evaluation.target={best}", "evaluation.stop_at_target=true")
    short = classification().run(*settings, *stop)
    assert 1 < first < 20
    assert len(short.rows) == first == short.summary["rounds_to_target"]
    assert hashes(short) == hashes(whole)[:first]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("strategy=fedprox strategy.mu=-1", "strategy.mu"),
        ("strategy=scaffold strategy.option=3", "strategy.option"),
        ("strategy=fedcm strategy.alpha=0", "strategy.alpha"),
        ("strategy=fedadam strategy.tau=0", "strategy.tau"),
        ("strategy=fedyogi strategy.rule=yogurt", "strategy.rule"),
        ("strategy=feddyn strategy.alpha=0", "strategy.alpha"),
        ("strategy=moon strategy.tau=0", "strategy.tau"),
        ("client.min_epochs=9", "client.min_epochs"),
        ("evaluation.stop_at_target=true", "evaluation.stop_at_target"),
    ],
)
def test_impossible_options_are_refused_by_name(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}"):
        classification().run(*override.split())
