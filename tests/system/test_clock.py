"""Virtual time by hand: what an exchange costs, who drops out, and that nothing else has a say in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks import Interrupt
from problems import Problem, classes, classification, hashes, network

from fedsim.data.local import Batch
from fedsim.errors import ConfigError
from fedsim.system.cost import count_flops
from fedsim.task.task import Task

# The network has 4*5 + 5 + 5*3 + 3 = 43 parameters: 172 bytes down; up as many and 8 for the weight.
# Two epochs over n samples: 2 n / speed seconds. Sizes are 7, 12, 3, 10, 6, 11.
DOWN, UP = 0.1 + 172 / 1000, 0.1 + 180 / 500


def needed(n: int, speed: float = 10.0) -> float:
    return DOWN + 2 * n / speed + UP


def told(row: dict[str, Any]) -> list[tuple[int, str]]:
    return [(f["client"], f["reason"]) for f in row["failures"] if f["kind"] == "dropped"]


def run(fleet: str, *overrides: str, cohorts: Any = None, **changes: Any) -> Any:
    problem = classification(cohorts=cohorts, **changes)
    return problem.run("system=table", fleet, "rounds=1", *overrides)


def test_a_round_takes_as_long_as_its_slowest_client(fleet: str) -> None:
    row = run(fleet, cohorts=[[0, 1, 2]]).rows[0]
    assert row["sim_seconds"] == pytest.approx(needed(3, speed=1.0))  # 6.7 s against 3.1 s
    work = 2 * (2 * 7 / 10 + 2 * 12 / 10 + 2 * 3 / 1)
    assert row["joules"] == pytest.approx(work + 3 * (DOWN + UP))


def test_every_client_has_its_own_line(fleet: str) -> None:
    table = run(fleet, cohorts=[[0, 1]]).per_client
    seconds = table[table.metric == "sim_seconds"].set_index("client").value
    assert seconds.to_dict() == pytest.approx({0: needed(7), 1: needed(12)})
    gradients = table[table.metric == "gradients"].set_index("client").value
    assert gradients.to_dict() == {0: 14.0, 1: 24.0}


def test_a_second_gradient_costs_a_second_gradient(fleet: str) -> None:
    row = run(fleet, "strategy=fedsam", cohorts=[[0]]).rows[0]
    assert row["sim_seconds"] == pytest.approx(needed(7) + 14 / 10)


def test_the_deadline_drops_stragglers_and_is_waited_for(fleet: str) -> None:
    result = run(fleet, "system.deadline=4", "system.stragglers=drop", cohorts=[[0, 1, 2]])
    row = result.rows[0]
    assert told(row) == [(2, "missed the deadline of 4 s (needed 6.732 s)")]
    assert row["sim_seconds"] == 4
    assert row["bytes_up"] == 2 * 180 and row["bytes_down"] == 3 * 172
    assert hashes(result) == hashes(classification(cohorts=[[0, 1]]).run("rounds=1"))


def test_the_deadline_counts_gradients_of_a_rule_it_sees_for_the_first_time(fleet: str) -> None:
    """Two gradients a step: client 1 needs 5.5 s, not 3.1 s, from the first round on."""
    row = run(fleet, "strategy=fedsam", "system.deadline=4", "system.stragglers=drop", cohorts=[[0, 1]]).rows[
        0
    ]
    assert told(row) == [(1, "missed the deadline of 4 s (needed 5.532 s)")]


def test_partial_work_is_what_fits_before_the_deadline(fleet: str) -> None:
    """Client 2 at 1 sample/s: of 2 epochs over 3 samples (1 batch each) one fits into 4 s; client 1 has 6 batches."""
    settings = ["system.deadline=4", "system.stragglers=partial"]
    result = run(fleet, *settings, cohorts=[[1, 2]])
    row = result.rows[0]
    assert not told(row)
    steps = result.per_client.query("metric == 'steps'").set_index("client").value
    assert steps.to_dict() == {1: 6.0, 2: 1.0}
    assert row["sim_seconds"] == pytest.approx(DOWN + 3 / 1 + UP)
    late = run(fleet, "system.deadline=3", "system.stragglers=partial", cohorts=[[1, 2]])
    assert told(late.rows[0]) == [(2, "missed the deadline of 3 s (needed 3.732 s)")]
    assert late.per_client.query("metric == 'steps'").value.tolist() == [5.0]  # 20 samples: 2.732 s
    assert late.rows[0]["sim_seconds"] == 3


def test_the_first_answers_count_when_more_are_asked(fleet: str) -> None:
    settings = ["system.over_selection=1.5", "system.stragglers=drop", "clients_per_round=4"]
    result = run(fleet, *settings)
    row = result.rows[0]
    assert row["cohort"] == [0, 1, 2, 3, 4, 5]
    assert told(row) == [(1, "came after the first 4"), (2, "came after the first 4")]
    assert row["sim_seconds"] == pytest.approx(needed(11))
    assert hashes(result) == hashes(classification(cohorts=[[0, 3, 4, 5]]).run("rounds=1"))


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_who_drops_out_leaves_no_trace_but_its_time(fleet: str, when: str) -> None:
    cohorts = [list(range(6))] * 6
    result = run(
        fleet, f"system.dropout.{when}=0.5", "rounds=6", cohorts=cohorts, settings=("client.epochs=2",)
    )
    lost = [{c for c, _ in told(row)} for row in result.rows]
    assert all(why == f"lost {when} training" for row in result.rows for _, why in told(row))
    assert 6 < sum(map(len, lost)) < 30
    without = [[c for c in range(6) if c not in gone] for gone in lost]
    again = classification(cohorts=without, settings=("client.epochs=2",)).run("rounds=6")
    assert hashes(result) == hashes(again)
    for row, gone in zip(result.rows, lost, strict=True):
        assert row["bytes_down"] == 172 * (6 - len(gone) if when == "before" else 6)
        assert row["bytes_up"] == 180 * (6 - len(gone))


def test_a_server_that_asks_blindly_loses_who_is_not_there(fleet: str) -> None:
    settings = [
        "system/availability=random",
        "system.check_in=false",
        "rounds=8",
        "system.availability.every=5",
    ]
    result = run(fleet, *settings, "clients_per_round=6")
    reasons = {why for row in result.rows for _, why in told(row)}
    assert reasons == {"is not there", "left before it was done"}
    polite = run(fleet, *settings, "system.check_in=true", "clients_per_round=6")
    assert {why for row in polite.rows for _, why in told(row)} == {"left before it was done"}
    assert {len(row["cohort"]) for row in polite.rows} != {6}


def test_a_round_nobody_could_be_asked_for_passes(fleet: str, tmp_path: Path) -> None:
    """The one phone charges from 1500 s to 3000 s of each hour."""
    (tmp_path / "trace.csv").write_text("client,start_s,end_s\n7,1500,3000\n")
    settings = [
        "system/availability=trace",
        f"system.availability.path={tmp_path / 'trace.csv'}",
        "+system.traces=x",
    ]
    result = run(fleet, *settings, "system.availability.period=3600", "system.idle=1000", "rounds=4")
    assert [len(row["cohort"]) for row in result.rows] == [0, 0, 3, 3]
    assert [row["sim_seconds"] for row in result.rows[:2]] == [1000, 1000]
    first, second, third, _ = hashes(result)
    assert first == second != third


def test_devices_too_small_for_the_model_are_not_asked(tmp_path: Path) -> None:
    """43 parameters in float32, three times: 516 bytes."""
    rows = "\n".join(f"1,1,1,{0.000517 if c % 2 else 0.000515}" for c in range(6))
    (tmp_path / "fleet.csv").write_text(f"speed,down,up,memory\n{rows}\n")
    result = run(f"system.devices.path={tmp_path / 'fleet.csv'}", "clients_per_round=6")
    assert result.rows[0]["cohort"] == [1, 3, 5]
    blind = run(
        f"system.devices.path={tmp_path / 'fleet.csv'}", "clients_per_round=6", "system.check_in=false"
    )
    assert told(blind.rows[0]) == [(c, "lacks the 0.000516 MB that training takes") for c in (0, 2, 4)]


def test_flops_are_those_of_the_layers() -> None:
    """A product of (B, i) and (i, o) is 2 B i o; backward: as much for the weights, and for inputs but the first."""
    batch = Batch(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    cost = count_flops(Task(network()), torch.float32, batch)
    one, two = 2 * 4 * 5, 2 * 5 * 3
    assert (cost.forward, cost.gradient) == (one + two, 2 * one + 3 * two)


def test_time_and_bits_do_not_depend_on_the_engine(fleet: str, ray: str) -> None:
    settings = ["system=lognormal", "system/availability=random", "system.dropout.during=0.2", "rounds=5"]
    settings += [
        "system.deadline=0.35",
        "system.stragglers=partial",
        "system.over_selection=1.5",
        "engine.chunks=3",
    ]
    problem = classification()
    serial = problem.run(*settings)
    kept = ("sim_seconds", "cohort", "failures", "weights_hash")
    for workers in (1, 2):
        other = problem.run(*settings, ray, f"engine.workers={workers}")
        assert [[row[k] for k in kept] for row in other.rows] == [
            [row[k] for k in kept] for row in serial.rows
        ]


def test_a_resumed_run_goes_on_at_its_virtual_time(tmp_path: Path) -> None:
    settings = ["system=lognormal", "system/availability=random", "system.availability.every=0.5", "rounds=6"]
    settings += ["sampling=oort", "system.dropout.during=0.2", "strategy=moon"]
    problem = classification()
    kept = ("sim_seconds", "cohort", "failures", "weights_hash")
    expected = [[row[k] for k in kept] for row in problem.run(*settings).rows]
    for after in (1, 4):
        place = f"dir={tmp_path / str(after)}"
        with pytest.raises(KeyboardInterrupt):
            problem.run(*settings, place, callbacks=[Interrupt(after)])
        assert [[row[k] for k in kept] for row in problem.run(*settings, place).rows] == expected


@pytest.mark.parametrize("method", [[], ["strategy=fedbuff", "strategy.buffer=2", "strategy.concurrency=3"]])
def test_nobody_sleeps_through_virtual_hours(method: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} s")

    monkeypatch.setattr("time.sleep", refuse)
    slow = ["system=lognormal", "system.devices.speed=0.001", "system/availability=diurnal"]
    result = classification().run(*method, *slow, "system.availability.hours=24")
    assert sum(row["sim_seconds"] for row in result.rows) > 10 * 3600


def test_no_fleet_no_virtual_time() -> None:
    assert [row["sim_seconds"] for row in classification().run().rows] == [None] * 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["system.deadline=0", "system.stragglers=drop"], "system.deadline=0: must be positive"),
        (["system.deadline=5"], "system.deadline=5.*choose system.stragglers=drop or partial"),
        (["system.stragglers=partial"], "system.stragglers=partial: needs system.deadline"),
        (["system.over_selection=2"], "system.over_selection=2.*choose system.stragglers=drop"),
        (["system.stragglers=never"], "system.stragglers=never: choose one of wait, drop, partial"),
        (["system.dropout.before=1"], r"system.dropout.before=1: must be in \[0, 1\)"),
        (["system.dropout=0.3"], "system.dropout=0.3: has options of its own"),
        (["system.devices.speed=0"], "system.devices.speed=0: must be positive"),
        (["system.work=steps"], "system.work=steps: choose samples or flops"),
        (["sampling=weighted", "participation=bernoulli"], "participation=bernoulli: only sampling=uniform"),
    ],
)
def test_impossible_settings_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run("system=lognormal", *overrides)


def test_a_batch_of_clients_at_once_costs_the_same(fleet: str) -> None:
    loop, together = (run(fleet, f"engine.vectorize={v}", cohorts=[[0, 1, 4]]) for v in ("off", "on"))
    assert loop.rows[0]["sim_seconds"] == together.rows[0]["sim_seconds"]


def test_partial_work_is_the_true_number_of_steps_to_the_method(fleet: str) -> None:
    """SCAFFOLD divides by K: a client cut to one step of two must not divide by two."""
    clients = classes((7, 12, 3))
    problem = Problem(
        network(), clients, ("rounds=2", "dtype=float64", "client.batch_size=4"), cohorts=[[2]] * 2
    )
    settings = ["strategy=scaffold", "client.epochs=2"]
    limits = ["system=table", fleet, "system.deadline=6", "system.stragglers=partial"]
    cut = problem.run(*settings, *limits)
    assert cut.per_client.query("metric == 'steps'").value.tolist() == [1.0, 1.0]
    assert hashes(cut) == hashes(problem.run(*settings, "client.steps=1"))
    assert hashes(cut) != hashes(problem.run(*settings))
