"""Clients held out for good: never asked, the partition unchanged, measured as they are or after some training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import classes, classification, hashes, network

from fedsim.errors import ConfigError
from fedsim.sampling.exclusion import draw_held_out
from fedsim.server.measuring import gaps

SIZES = (20, 24, 16, 12, 20, 28)
SHORT = ("rounds=2", "clients_per_round=6", "client.epochs=1", "client.batch_size=4", "evaluation.every=1")
HELD = "evaluation.held_out_clients=0.3"


def problem(**changes: Any) -> Any:
    return classification(**{"clients": classes(SIZES), "settings": SHORT, **changes})


def accuracy(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    model = network()
    model.load_state_dict(weights)
    return float((model(x).argmax(1) == y).double().mean())


def test_they_are_never_asked_and_the_model_is_measured_on_all_their_samples() -> None:
    found = problem().run(HELD)
    held = draw_held_out(0, 6, 0.3)
    assert len(held) == 2
    assert all(set(row["cohort"]) == set(range(6)) - held for row in found.rows)
    clients = classes(SIZES)
    expected = [accuracy(found.weights, *clients[c]) for c in sorted(held)]
    assert found.rows[-1]["held_out/accuracy"] == pytest.approx(np.mean(expected))
    sizes = [SIZES[c] for c in sorted(held)]
    assert found.rows[-1]["held_out/accuracy_weighted"] == pytest.approx(np.average(expected, weights=sizes))
    assert found.summary["held_out/accuracy"] == found.rows[-1]["held_out/accuracy"]
    assert hashes(found) == hashes(problem().run(f"exclude={sorted(held)}"))  # the same contract
    assert found.summary["partition_hash"] == problem().run().summary["partition_hash"]


def test_the_gaps_are_between_means_over_clients() -> None:
    found = problem().run(HELD, "evaluation.holdout=0.25", "evaluation.clients_every=1")
    for row in found.rows:
        train, test, new = (row[f"{k}/accuracy"] for k in ("clients_train", "clients", "held_out"))
        assert row["out_of_sample_gap"] == train - test and row["participation_gap"] == test - new
        assert row["participation_gap/loss"] == row["clients/loss"] - row["held_out/loss"]
    assert len(found.per_client.query("metric == 'evaluate/accuracy' and round == 1")) == 4
    seldom = problem().run(HELD, "evaluation.holdout=0.25", "evaluation.clients_every=2")
    assert "held_out/accuracy" not in seldom.rows[0] and "participation_gap" in seldom.rows[1]


def test_what_is_not_measured_has_no_gap() -> None:
    assert gaps({"held_out/accuracy": 0.5}) == {}
    found = gaps({"held_out/loss": 0.5, "clients/loss": 0.25, "held_out/loss_std": 1.0})
    assert found == dict.fromkeys(("participation_gap", "participation_gap/loss"), -0.25)


def test_after_some_steps_on_half_of_their_samples_the_other_half_is_measured() -> None:
    none, some = (problem().run(HELD, f"evaluation.held_out_steps={s}") for s in (0, 20))
    assert hashes(none) == hashes(some)  # they train for themselves
    assert some.rows[-1]["held_out/loss"] < none.rows[-1]["held_out/loss"]
    steps = some.per_client.query("metric == 'held_out/gradients'")
    assert set(steps["client"]) == draw_held_out(0, 6, 0.3) and (steps["value"] > 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        ("strategy=fedrep",),
        ("strategy=local_only",),
        ("strategy=scaffold", "buffers=all_local"),
        ("strategy=fraug", "strategy.rounds=6"),
        ("strategy=ggeur", "strategy.target=6"),
        ("strategy=centralised",),
        ("strategy=fedbuff", "system=lognormal", "strategy.concurrency=2", "strategy.buffer=2"),
        ("client=adam",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("steps", [0, 3])
def test_any_method_measures_them(settings: tuple[str, ...], steps: int) -> None:
    found = problem().run(HELD, f"evaluation.held_out_steps={steps}", *settings)
    assert 0 <= found.rows[-1]["held_out/accuracy"] <= 1 and not any(r["failures"] for r in found.rows)


def test_samples_of_all_others_in_one_place_do_not_hold_theirs() -> None:
    clients = classes(SIZES)
    held = draw_held_out(0, 6, 0.3)
    for c in held:
        clients[c] = (clients[c][0] * 3, (clients[c][1] + 1) % 3)
    pooled, other = (p.run(HELD, "strategy=centralised") for p in (problem(), problem(clients=clients)))
    assert (
        hashes(pooled) == hashes(other)
        and pooled.rows[-1]["held_out/loss"] != other.rows[-1]["held_out/loss"]
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["evaluation.held_out_clients=1"], r"evaluation.held_out_clients=1.0: must be in \[0, 1\)"),
        (["evaluation.held_out_clients=0.99"], "of 6 clients nobody is left to train"),
        (["evaluation.held_out_clients=0.01", "exclude=[{held}]"], "those are all clients that"),
        ([HELD, "evaluation.held_out_steps=-1"], "must not be negative"),
    ],
)
def test_what_leaves_nobody_is_refused(settings: list[str], said: str) -> None:
    (held,) = draw_held_out(0, 6, 0.01)
    with pytest.raises(ConfigError, match=said):
        problem().run(*(s.format(held=held) for s in settings))


def test_who_is_never_there_has_no_model_of_its_own() -> None:
    held = min(draw_held_out(0, 6, 0.3))
    found = problem().run(HELD, "strategy=ditto")
    with pytest.raises(ConfigError, match=f"client={held}: it is never there"):
        found.model(client=held)
