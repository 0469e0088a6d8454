"""Batteries by hand: what drains them, what fills them, and who is not asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import classification, hashes

from fedsim.errors import ConfigError, DataError
from fedsim.report import load_runs
from fedsim.run.whatif import compose_system, reprice
from fedsim.system.availability import Always, Availability, Diurnal, Random, Trace
from fedsim.system.battery import Batteries, Battery, lasting

# As in test_clock.py: 172 bytes down, 180 up, two epochs over 7, 12, 3, 10, 6, 11 samples; 2 W and 1 W.
SPENT = [2 * 2 * n / 10 + 0.1 + 0.172 + 0.1 + 0.36 for n in (7, 12, 3, 10, 6, 11)]
KEPT = ("sim_seconds", "cohort", "failures", "weights_hash", "battery", "joules")


@pytest.fixture
def fleet(tmp_path: Path) -> list[str]:
    """Six phones of 10 J: at 10 samples/s, 1 kB/s down, 0.5 kB/s up, 100 ms, full but for client 4 (15 %)."""
    rows = [f"10,1,0.5,100,2,1,{10 / 3600},{0.15 if c == 4 else 1}" for c in range(6)]
    head = "speed,down,up,latency,compute_watts,radio_watts,battery,charge\n"
    (tmp_path / "phones.csv").write_text(head + "\n".join(rows) + "\n")
    return ["system=table", f"system.devices.path={tmp_path / 'phones.csv'}"]


def levels(result: Any, round: int) -> dict[int, float]:
    table = result.per_client.query(f"metric == 'battery' and round == {round}")
    return dict(table.set_index("client").value)


def told(row: dict[str, Any]) -> dict[int, str]:
    return {f["client"]: f["reason"] for f in row["failures"]}


def test_energy_drains_and_charging_restores(fleet: list[str]) -> None:
    """Two rounds of clients 0 and 2; meanwhile 0.5 W flow, all the time."""
    problem = classification(cohorts=[[0, 2], [0, 2]])
    result = problem.run(*fleet, "rounds=2", "system.battery.charge_watts=0.5")
    assert levels(result, 1) == pytest.approx({0: 1 - SPENT[0] / 10, 2: 1 - SPENT[2] / 10})
    took = result.rows[0]["sim_seconds"]
    second = {c: min(10, 10 - SPENT[c] + 0.5 * took) - SPENT[c] for c in (0, 2)}
    assert levels(result, 2) == pytest.approx({c: v / 10 for c, v in second.items()})
    assert result.rows[1]["battery"] == pytest.approx(np.mean([v / 10 for v in second.values()]))
    assert hashes(result) == hashes(problem.run("rounds=2"))


def test_who_is_low_is_not_asked_until_it_has_charged(fleet: list[str]) -> None:
    """Of 10 J: client 4 begins below 20 %; nothing is charged, so that nobody comes back."""
    drained = [*fleet, "system.battery.charge_watts=0", "rounds=6", "clients_per_round=6", "system.idle=9"]
    result = classification().run(*drained)
    left, asked = np.array([10.0] * 4 + [1.5, 10]), []
    for row in result.rows:
        asked.append([c for c in range(6) if left[c] >= 2])
        assert row["cohort"] == asked[-1]
        assert set(told(row)) == {c for c in asked[-1] if left[c] < SPENT[c]}
        for c in asked[-1]:
            left[c] = max(left[c] - SPENT[c], 0)
    assert 4 not in asked[0] and len(asked[0]) == 5 and asked[-1] == [] and "battery" not in result.rows[-1]
    charged = classification().run(*drained[:2], "system.battery.charge_watts=1", *drained[3:])
    first = next(i for i, row in enumerate(charged.rows) if 4 in row["cohort"])
    passed = [sum(row["sim_seconds"] for row in charged.rows[:n]) for n in (first - 1, first)]
    assert passed[0] < 0.5 <= passed[1]  # it lacks 0.5 J at 1 W


def test_a_client_whose_battery_runs_out_is_lost_at_that_moment(fleet: list[str]) -> None:
    blind = [*fleet, "system.battery.threshold=0.1", "rounds=1"]
    result = classification(cohorts=[[0, 4]]).run(*blind)
    assert told(result.rows[0]) == {4: "its battery ran out"}
    # 0.272 J for the message, the rest at 2 W: 1.5 J last 0.272 + 1.228 / 2 seconds
    gone = result.per_client.query("client == 4 and metric == 'sim_seconds'").value.item()
    assert gone == pytest.approx(0.272 + 1.228 / 2)
    assert levels(result, 1)[4] == pytest.approx(0)
    assert hashes(result) == hashes(classification(cohorts=[[0]]).run("rounds=1"))
    unasked = classification(cohorts=[[0, 4]]).run(*fleet, "rounds=1")
    assert told(unasked.rows[0]) == {4: "has less than 20% of its battery"}


def test_lasting_goes_part_by_part() -> None:
    parts = [(np.full(4, s), np.full(4, w)) for s, w in ((1.0, 2.0), (2.0, 3.0), (1.0, 0.0))]
    found = lasting(np.array([1.0, 5.0, 8.0, np.inf]), *parts)
    np.testing.assert_allclose(found, [0.5, 2.0, np.inf, np.inf])


@pytest.mark.parametrize("kind", ["always", "random", "diurnal", "trace"])
def test_time_plugged_in_is_the_sum_of_the_moments(kind: str, tmp_path: Path) -> None:
    """Against presence looked at twice a second, over three periods."""
    (tmp_path / "t.csv").write_text("client,start_s,end_s\n1,5,20\n1,40,55\n2,50,60\n2,0,10\n3,0,60\n")
    rules: dict[str, Availability] = {
        "always": Always(),
        "random": Random(p=0.4, every=7.0),
        "diurnal": Diurnal(hours=9, start_hour=20, spread=4),
        "trace": Trace(path=str(tmp_path / "t.csv"), period=60.0),
    }
    unit = 1000.0 if kind == "diurnal" else 1.0
    presence, ids = rules[kind].start(9, 3), np.arange(9)
    start, end = unit * np.linspace(0, 40, 9).round(), 180.0 * unit
    times = unit * (np.arange(0, 180, 0.5) + 0.25)
    there = np.array([presence.until(ids, t) > t for t in times])
    counted = (there & (times[:, None] > start)).sum(axis=0) * 0.5 * unit
    np.testing.assert_allclose(presence.during(ids, start, end), counted, atol=3 * unit if unit > 1 else 1e-9)
    assert presence.during(ids[:0], start[:0], end).shape == (0,)


HARD = ["system=lognormal", "system.devices.compute_watts=2", "system.devices.radio_watts=1", "rounds=6"]
HARD += ["system.devices.battery=0.0008", "system.devices.charge=[0.2,0.9]", "system/availability=random"]
HARD += ["system.availability.every=0.5", "system.battery.charge_watts=1", "system.idle=0.4"]


class Stop:
    def round(self, row: dict[str, Any], clients: list[Any]) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "method", [["strategy=fedavg"], ["strategy=fedbuff", "strategy.buffer=2", "strategy.concurrency=3"]]
)
def test_levels_are_the_same_after_resuming_and_for_any_number_of_workers(
    method: list[str], ray: str, tmp_path: Path
) -> None:
    run = classification().run
    expected = [[row.get(k) for k in KEPT] for row in run(*method, *HARD).rows]
    found = {k: [row[i] for row in expected] for i, k in enumerate(KEPT)}
    assert len({*found["battery"]} - {None}) > 3
    assert any("battery" in f["reason"] for lost in found["failures"] for f in lost) or any(
        len(c) < 3 for c in found["cohort"]
    )
    place = f"dir={tmp_path / 'run'}"
    with pytest.raises(KeyboardInterrupt):
        run(*method, *HARD, place, callbacks=[Stop()])
    assert [[row.get(k) for k in KEPT] for row in run(*method, *HARD, place).rows] == expected
    assert [
        [row.get(k) for k in KEPT] for row in run(*method, *HARD, ray, "engine.workers=2").rows
    ] == expected
    assert expected != [[row.get(k) for k in KEPT] for row in run(*method, *HARD, "seed=1").rows]


def test_it_can_be_plugged_in_at_times_of_its_own() -> None:
    own = ["+system/availability@system.battery.charging=diurnal", "system.battery.charging.hours=6"]
    system = compose_system("lognormal", own).system
    assert system.battery.charging._target_.endswith(".Diurnal") and system.battery.charging.hours == 6
    assert system.availability._target_.endswith(".Always")
    runs = [classification().run(*HARD, *o) for o in (own, [])]
    first, second = ([row.get("battery") for row in run.rows] for run in runs)
    assert first != second


def test_keeping_levels_up_costs_the_clients_asked() -> None:
    looked: list[int] = []

    class Count(Always):
        def during(self, ids: np.ndarray, start: np.ndarray, end: float) -> np.ndarray:
            looked.append(len(ids))
            return super().during(ids, start, end)

    m = 1_000_000
    batteries = Batteries(Battery(threshold=0.2, charge_watts=1), Count(), np.full(m, 10.0), np.full(m, 5.0))
    for now in range(5):
        batteries.spend(np.arange(7), np.full(7, 2.0), float(now))
    assert sum(looked) == 35 and len(batteries.save()) == 7
    left = batteries.share(np.array([0, 8]), 9.0)
    np.testing.assert_allclose(left, [0.5, 1.0])  # 3 2 1 0 0 J, then 5 s at 1 W


def test_what_if_says_when_batteries_forbid_it(fleet: list[str]) -> None:
    drained, plain = (classification().run(*o, "rounds=1") for o in (fleet, ["system=lognormal"]))
    (run,) = load_runs([drained.dir])
    with pytest.raises(ConfigError, match=r"depended on its own devices .*battery"):
        reprice(run, compose_system("lognormal"))
    (run,) = load_runs([plain.dir])
    watts = ["system.devices.compute_watts=2", "system.devices.radio_watts=1", "system.devices.battery=12"]
    with pytest.raises(ConfigError, match="batteries would change who takes part"):
        reprice(run, compose_system("lognormal", watts))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["system.devices.battery=10"], DataError, "client 0: a battery needs compute_watts and radio_watts"),
        (["system.devices.charge=[0.5,0.2]"], ConfigError, r"charge=\[0.5, 0.2\]: must be two shares"),
        (["system.battery.threshold=1"], ConfigError, r"system.battery.threshold=1: must be in \[0, 1\)"),
        (["system.battery.charge_watts=-1"], ConfigError, "charge_watts=-1: must not be negative"),
    ],
)
def test_impossible_settings_are_named(overrides: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        classification().run("system=lognormal", *overrides)
