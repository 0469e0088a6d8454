"""Clients that are never there: every strategy computes what it would if their samples were others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Problem, classes, classification, hashes
from registry import TABLE, Entry

RING = "\n".join(
    f"{i} {j}" for i in range(6) for j in range(i)
)  # everybody hears everybody: connected without any
ABSENT = 2


def problem(**changes: Any) -> Problem:
    settings = (
        "rounds=2",
        "clients_per_round=5",
        "client.epochs=1",
        "client.batch_size=4",
        "engine.chunks=2",
    )
    measured = ("evaluation.every=1", "evaluation.holdout=0.2", "evaluation.clients_every=2")
    return classification(settings=(*settings, *measured), **changes)


def others() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The clients of ``classes``, one of them with as many other samples."""
    clients = classes()
    x, y = clients[ABSENT]
    clients[ABSENT] = (3 * x.flip(0) + 1, (y + 1) % 3)
    return clients


def facts(row: Any) -> Any:
    """All that a row holds but real time."""
    timeless = isinstance(row, dict)
    return {k: facts(v) for k, v in row.items() if k != "seconds"} if timeless else row


PEERS = Entry("gossip-async", "gossip_async", ("topology=ring", "strategy.init_models=shared"))


@pytest.mark.parametrize("entry", (*TABLE, PEERS), ids=lambda e: e.label)
def test_nobody_uses_the_samples_of_a_client_that_is_excluded(entry: Entry, tmp_path: Path) -> None:
    arguments = [o for o in entry.arguments if not o.startswith("topology=")]
    if len(arguments) < len(entry.arguments):
        (tmp_path / "edges.txt").write_text(RING)
        arguments += ["topology=edge_list", f"topology.path={tmp_path / 'edges.txt'}"]
    settings = [*arguments, f"exclude=[{ABSENT}]"]
    first, again = problem().run(*settings), problem(clients=others()).run(*settings)
    assert [*map(facts, first.rows)] == [*map(facts, again.rows)]
    assert len({*hashes(first)}) == 2  # every round moved the model
    assert ABSENT not in first.per_client["client"].to_numpy()
    assert {c for row in first.rows for c in row["cohort"]} <= {0, 1, 3, 4, 5}


@pytest.mark.parametrize(
    "sampling",
    [
        ("weighted",),
        ("round_robin",),
        ("staying", "system=lognormal"),
        ("power_of_choice",),
        ("power_of_choice", "sampling.loss=last"),
        ("oort",),
        ("uniform", "participation=bernoulli"),
        ("uniform", "exclude_fill=shrink"),
        ("uniform", "system=lognormal", "system/availability=random"),
    ],
    ids=" ".join,
)
def test_no_sampling_rule_looks_at_them(sampling: tuple[str, ...]) -> None:
    settings = [
        f"sampling={sampling[0]}",
        *sampling[1:],
        f"exclude=[{ABSENT}]",
        "clients_per_round=3",
        "rounds=4",
    ]
    first, again = problem().run(*settings), problem(clients=others()).run(*settings)
    assert [*map(facts, first.rows)] == [*map(facts, again.rows)]
    assert ABSENT not in first.per_client["client"].to_numpy()


def test_without_being_excluded_its_samples_count() -> None:
    assert hashes(problem().run()) != hashes(problem(clients=others()).run())


def test_who_is_never_drawn_makes_no_difference() -> None:
    """But where a method counts all clients, as FedDyn, or all samples; FedAvg does not."""
    settings = ("rounds=3", "clients_per_round=2", "client.epochs=1", "client.batch_size=4")
    base = classification(settings=settings).run()
    drawn = {c for row in base.rows for c in row["cohort"]}
    never = next(c for c in range(6) if c not in drawn)
    assert hashes(classification(settings=settings).run(f"exclude=[{never}]")) == hashes(base)
    counted = classification(settings=settings)
    assert hashes(counted.run("strategy=feddyn", f"exclude=[{never}]")) != hashes(
        counted.run("strategy=feddyn")
    )
