"""Clients that are never there: every strategy computes what it would if their samples were others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks import Interrupt
from problems import Problem, classes, classification, hashes, method
from registry import COHORTS, MECHANISMS, METHODS, SPREAD, Entry, mostly, often

from fedsim.errors import ConfigError

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


@pytest.mark.parametrize("entry", mostly((*METHODS, PEERS)), ids=lambda e: e.label)
def test_nobody_uses_the_samples_of_a_client_that_is_excluded(entry: Entry, tmp_path: Path) -> None:
    arguments = [o for o in entry.arguments if not o.startswith("topology=")]
    if len(arguments) < len(entry.arguments):
        (tmp_path / "edges.txt").write_text(RING)
        arguments += ["topology=edge_list", f"topology.path={tmp_path / 'edges.txt'}"]
    settings = [*arguments, f"exclude=[{ABSENT}]"]
    first, again = problem().run(*settings), problem(clients=others()).run(*settings)
    assert [*map(facts, first.rows)] == [*map(facts, again.rows)]
    assert len({*hashes(first)}) == entry.moves(2)  # every round moved the model
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


# Methods whose weights may change by a client that is never drawn: what they compute from all clients. (CFL too, but in
# the third round at the earliest: it halves by what the round before proposed.)
COUNTED = {
    "fedspeed": "dual variables averaged over all clients: their number",
    "fedspeed-relaxed": "likewise",
    "alie": "FedSpeed",
    "scaffold": "the control variate moves by the share of all clients: their number",
    "scaffold-1": "likewise",
    "flag-reverse": "SCAFFOLD",
    "feddyn": "m, the number of clients",
    "ggeur": "statistics of all clients' features",
    "ggeur-scaffold": "likewise",
    "logit-adjust-all": "class counts of all clients",
    "afl": "a weight for every client: their number",
    "ifca": "starts are spread over models of all clients",
    "fesem": "likewise",
    "semifl": "the server's labelled samples are drawn from those of all clients that are not excluded",
    "fedsto": "likewise",
}


@pytest.mark.parametrize(
    "entry", often([e for e in COHORTS if e.strategy != "gossip"], *SPREAD, "afl"), ids=lambda e: e.label
)
def test_who_is_in_no_cohort_counts_only_where_a_method_counts_all_clients(entry: Entry) -> None:
    given = problem(cohorts=[[0, 1, 3], [1, 4, 5]])
    same = hashes(given.run(*entry.arguments, f"exclude=[{ABSENT}]")) == hashes(given.run(*entry.arguments))
    assert same == (entry.label not in COUNTED)
    traits = method(entry.strategy, *entry.overrides).traits
    if entry.trains_alone:
        return  # not the method's doing: data.labelled.at=server tells (fedsim/replay/variants.py)
    assert same or traits.meets_all_clients or traits.counts_clients or not traits.asked_only


@pytest.mark.parametrize("entry", (*MECHANISMS, PEERS), ids=lambda e: e.label)
def test_a_run_without_a_client_goes_on_from_its_checkpoint(entry: Entry, tmp_path: Path) -> None:
    settings = [o for o in entry.arguments if not o.startswith("topology=")]
    if len(settings) < len(entry.arguments):
        (tmp_path / "edges.txt").write_text(RING)
        settings += ["topology=edge_list", f"topology.path={tmp_path / 'edges.txt'}"]
    settings += [f"exclude=[{ABSENT}]", "rounds=4", "clients_per_round=3"]
    expected, place = problem().run(*settings), f"dir={tmp_path / 'run'}"
    with pytest.raises(KeyboardInterrupt):
        problem().run(*settings, place, callbacks=[Interrupt(2)])
    assert [*map(facts, problem().run(*settings, place).rows)] == [*map(facts, expected.rows)]


def test_samples_that_are_left_out_are_used_by_nobody(tmp_path: Path) -> None:
    clients = classes()
    x, y = (t.clone() for t in clients[ABSENT])
    x[1], y[1] = 5 * x[1] + 1, (y[1] + 1) % 3
    clients[ABSENT] = (x, y)
    left = f"exclude_samples={{{ABSENT}: [1]}}"
    for sampling in ("uniform", "weighted", "oort"):
        settings = [left, f"sampling={sampling}", "clients_per_round=4"]
        first, again = problem().run(*settings), problem(clients=clients).run(*settings)
        assert [*map(facts, first.rows)] == [*map(facts, again.rows)]
    assert [*map(facts, problem().run().rows)] != [*map(facts, problem(clients=clients).run().rows)]


@pytest.mark.parametrize("left", [f"exclude=[{ABSENT}]", f"exclude_samples={{{ABSENT}: [1]}}"])
@pytest.mark.parametrize(
    "settings",
    [
        ("audit.canaries=12", "audit.guesses=4"),
        ("audit.canaries=12", "audit.guesses=4", "audit.kind=duplicate"),
        ("attack=backdoor", "attack.fraction=0.4"),
    ],
    ids=" ".join,
)
def test_what_is_made_of_the_samples_at_hand_is_not_made_of_theirs(
    settings: tuple[str, ...], left: str
) -> None:
    """Canaries, and the trigger of a backdoor, whose value is the largest of all samples."""
    clients = classes()
    x, y = (t.clone() for t in clients[ABSENT])
    x[1], y[1] = 5 * x[1] + 9, (y[1] + 1) % 3
    clients[ABSENT] = (x, y)
    first, again = problem().run(*settings, left), problem(clients=clients).run(*settings, left)
    assert [*map(facts, first.rows)] == [*map(facts, again.rows)]
    there = problem().run(*settings), problem(clients=clients).run(*settings)
    assert [*map(facts, there[0].rows)] != [*map(facts, there[1].rows)]


def test_samples_that_are_left_out_move_nobody_elses() -> None:
    """Without a holdout the client trains on what is left of its samples, in a cohort that is what it was."""
    settings = (
        "rounds=2",
        "clients_per_round=4",
        "client.epochs=1",
        "client.batch_size=4",
        "evaluation.holdout=0",
    )
    whole = classification(settings=settings).run()
    less = classification(settings=settings).run("exclude_samples={1: [0, 5], 3: [9]}")
    assert [r["cohort"] for r in less.rows] == [r["cohort"] for r in whole.rows]
    for result, gone in ((whole, {}), (less, {1: 2, 3: 1})):
        frame = result.per_client
        sizes = frame[frame.metric == "samples"].set_index("client").value.to_dict()
        counts = dict(enumerate((7, 12, 3, 10, 6, 11)))
        assert all(n == counts[c] - gone.get(c, 0) for c, n in sizes.items())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "exclude_samples={6: [0]}",
            r"exclude_samples=\{6: \[0\]\}: client 6 does not exist; ids go from 0 to 5",
        ),
        ("exclude_samples={2: [3]}", "client 2 has 3 samples, at positions from 0 to 2"),
        ("exclude_samples={2: [1, 1]}", "give positions from 0, each once"),
        ("exclude_samples={2: [-1]}", "give positions from 0, each once"),
        ("exclude_samples={2: 1}", "give positions by client"),
        ("exclude_samples=[2]", "give positions by client"),
    ],
)
def test_samples_that_are_not_there_cannot_be_left_out(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classification().run(setting)


def test_a_client_is_left_out_as_a_whole_or_in_part() -> None:
    with pytest.raises(ConfigError, match="client 2 is left out as a whole"):
        classification().run("exclude_samples={2: [1]}", "exclude=[2]")
