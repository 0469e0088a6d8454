"""Options of local training: vectorised chunks, half precision, a target, and those that cannot work."""

from __future__ import annotations

import pytest
import torch
from problems import classification, hashes
from torch import Tensor
from torch.nn.functional import cross_entropy

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


@pytest.mark.parametrize("privacy", [(), ("privacy=record", "privacy.epsilon=20", "privacy.delta=1e-3")])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_forward_passes_in_half_precision_stay_near_float32(kind: str, privacy: tuple[str, ...]) -> None:
    exact, mixed = (classification().run(f"client.autocast={o}", *privacy) for o in ("null", kind))
    gap = max(float((exact.weights[k] - mixed.weights[k]).abs().max()) for k in exact.weights)
    assert 0 < gap < 0.05
    assert all(v.dtype == torch.float32 for v in mixed.weights.values())


def test_gradients_below_the_smallest_float16_are_not_lost() -> None:
    def small(output: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(output, y) * 1e-7

    start = classification().model.state_dict()
    settings = ("client.lr=1e5", "client.clip_norm=null", "rounds=1")
    exact, mixed = (
        classification().run(*settings, f"client.autocast={o}", loss=small) for o in ("null", "float16")
    )
    moved = sum(float((exact.weights[k] - start[k]).square().sum()) for k in start) ** 0.5
    gap = sum(float((exact.weights[k] - mixed.weights[k]).square().sum()) for k in start) ** 0.5
    assert gap < 0.1 * moved


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
