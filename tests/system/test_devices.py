"""Fleets from distributions, tables and traces; availability by the clock on the wall of the virtual world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import classification

from fedsim.config.compose import compose
from fedsim.errors import DataError
from fedsim.rng import normals, numpy_rng, uniforms
from fedsim.system.availability import Diurnal, Intervals, Random, Trace, fold
from fedsim.system.devices import Lognormal, Phones, Table, fleet_of

HOUR = 3600


def lognormal(**changes: float | None) -> Lognormal:
    values = {"speed": 50.0, "speed_sigma": 1.0, "down": 8.0, "up": 4.0, "link_sigma": 0.5, "latency": 20.0}
    rest = {"latency_sigma": 0.0, "memory": None, "compute_watts": None, "radio_watts": None}
    return Lognormal(**{**values, **rest, **changes})  # type: ignore[arg-type]


def test_draws_by_key_are_uniform_and_one_id_does_not_depend_on_others() -> None:
    ids = np.arange(200_000)
    u = uniforms(3, "x", ids, 5)
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.001 and 0 <= u.min() < u.max() < 1
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
    assert np.array_equal(uniforms(3, "x", np.array([7, 199]), 5), u[[7, 199]])
    assert not np.array_equal(uniforms(4, "x", ids, 5), u)
    z = normals(3, "x", ids, 5)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01


def test_lognormal_fleets_have_their_medians_and_spread() -> None:
    fleet = lognormal()(100_000, numpy_rng(0, "devices"))
    assert np.median(fleet.speed) == pytest.approx(50, rel=0.02)
    assert np.log(fleet.speed).std() == pytest.approx(1, rel=0.02)
    np.testing.assert_allclose(fleet.down, 2 * fleet.up)
    assert set(fleet.latency) == {20.0} and np.isinf(fleet.memory).all() and np.isnan(fleet.radio_watts).all()
    same = lognormal(speed_sigma=0.0)(10, numpy_rng(0, "devices"))
    assert set(same.speed) == {50.0}


def test_a_recorded_fleet_is_read_back(tmp_path: Path) -> None:
    fleet = lognormal()(5, numpy_rng(0, "devices"))
    path = fleet.save(tmp_path)
    again = Table(path=str(path), draw=False)(5, numpy_rng(1, "devices"))
    for name, values in vars(fleet).items():
        np.testing.assert_array_equal(getattr(again, name), values)
    drawn = Table(path=str(path), draw=True)(400, numpy_rng(1, "devices"))
    assert set(drawn.speed) == set(fleet.speed)


def test_a_very_large_fleet_is_recorded_in_binary(tmp_path: Path) -> None:
    fleet = lognormal()(100_001, numpy_rng(0, "devices"))
    path = fleet.save(tmp_path)
    assert path.name == "devices.npz"
    np.testing.assert_array_equal(Table(path=str(path), draw=False)(100_001, numpy_rng(0, "x")).up, fleet.up)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed,down\n1,1\n", "no column 'up'"),
        ("speed,down,up,ram\n1,1,1,1\n", "unknown column 'ram'"),
        ("speed,down,up\n1,1,1\n", "1 rows for 2 clients; give system.devices.draw=true"),
        ("speed,down,up\n1,1,1\n1,-3,1\n", "down of client 1 is -3.0; it must be positive"),
        ("speed,down,up\n1,1,1\n1,,1\n", "down of client 1 is nan; it must be positive"),
    ],
)
def test_an_unusable_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        Table(path=str(tmp_path / "t.csv"), draw=False)(2, numpy_rng(0, "devices"))
    with pytest.raises(DataError, match=r"no.csv: not a readable"):
        Table(path=str(tmp_path / "no.csv"), draw=False)(2, numpy_rng(0, "devices"))


def test_phones_are_those_of_the_tables(traces: Path) -> None:
    source = Phones(path=str(traces), speed=2e9, memory_share=0.5, compute_watts=2, radio_watts=1)
    fleet = source(20_000, numpy_rng(0, "devices"))
    phones, links = (pd.read_csv(traces / f"{n}.csv") for n in ("phones_ai_benchmark", "network_speed"))
    assert set(fleet.speed.round(3)) <= set(
        (2e9 * phones.cpu_float_score / phones.cpu_float_score.median()).round(3)
    )
    assert np.median(fleet.speed) == pytest.approx(2e9, rel=0.05)
    pairs = set(zip(links.down_mean_kBps, links.up_std_kBps, strict=True))
    assert set(zip(fleet.down, fleet.up_std, strict=True)) == pairs
    assert set(fleet.memory) <= set(500 * phones.ram_gb)
    assert 0 < fleet.latency.min() < np.median(fleet.latency) < 200


def test_random_presence_lasts_whole_slots() -> None:
    presence = Random(p=0.7, every=10.0).start(5000, 0)
    ids = np.arange(5000)
    ends = presence.until(ids, 23.0)
    there = ends > 23.0
    assert there.mean() == pytest.approx(0.7, abs=0.02)
    assert set(ends[there] % 10) == {0.0} and (ends[~there] == 23.0).all()
    assert (presence.until(ids, 33.0) > 33.0)[there].mean() == pytest.approx(0.7, abs=0.02)
    np.testing.assert_array_equal(ends[there & (ends > 30)], presence.until(ids, 30.0)[there & (ends > 30)])


def test_windows_come_every_day() -> None:
    presence = Diurnal(hours=6, start_hour=22, spread=0).start(4000, 0)
    ids = np.arange(4000)
    at = {h: (presence.until(ids, h * HOUR) > h * HOUR).mean() for h in (12, 21.9, 22.5, 26.5, 46.5)}
    assert at[12] == at[21.9] == 0 and at[22.5] == at[46.5] > 0.999 and 0.7 < at[26.5] < 0.9
    length = presence.until(ids, 22 * HOUR + 1) - 22 * HOUR
    assert length.mean() == pytest.approx(6 * HOUR, rel=0.03)


def test_intervals_fold_into_a_period() -> None:
    spans = fold(np.array([4, 4, 4, 9]), np.array([90.0, 20, 130, 5]), np.array([110.0, 30, 160, 5]), 100.0)
    assert spans.tolist() == [[4, 0, 10], [4, 20, 60], [4, 90, 100]]
    who = np.zeros(1, dtype=int)
    presence = Intervals(who, np.zeros(3, dtype=int), spans[:, 1], spans[:, 2], 100.0)
    ends = [float(presence.until(np.array([0]), t)[0]) for t in (5, 10, 25, 95, 195, 260)]
    assert ends == [10, 10, 60, 110, 210, 260]


def test_phones_charge_at_night(traces: Path) -> None:
    presence = Trace(path=str(traces / "availability_charging.csv"), period=86400.0).start(5000, 0)
    ids = np.arange(5000)
    share = {h: float((presence.until(ids, h * HOUR) > h * HOUR).mean()) for h in range(0, 48, 3)}
    assert share[3] > 2 * share[12] > 0
    assert share[3] == share[27]


def test_the_run_folder_holds_the_fleet_and_its_picture() -> None:
    result = classification().run("system=lognormal", "rounds=1", "tracker.plots=true")
    frame = pd.read_csv(result.dir / "devices.csv")
    assert frame.client.tolist() == list(range(6)) and (frame.speed > 0).all()
    assert (result.dir / "devices.png").read_bytes()[:4] == b"\x89PNG"
    other = classification().run("system=lognormal", "rounds=1", "seed=1")
    assert not frame.speed.equals(pd.read_csv(other.dir / "devices.csv").speed)


def test_real_phones_end_to_end(traces: Path) -> None:
    result = classification().run(
        "system=phones", f"system.traces={traces}", "clients_per_round=2", "rounds=3"
    )
    assert all(row["sim_seconds"] > 0 for row in result.rows)
    assert any(row.get("joules", 0) > 0 for row in result.rows)
    assert result.summary["sim_seconds"] == sum(row["sim_seconds"] for row in result.rows)


def test_missing_values_do_not_matter() -> None:
    fleet = fleet_of(3, {"speed": 1, "down": 2, "up": 3})
    assert fleet.latency.tolist() == [0, 0, 0] and fleet.memory.tolist() == [np.inf] * 3


@pytest.mark.parametrize("option", ["always", "random", "diurnal"])
def test_every_availability_can_be_chosen(option: str) -> None:
    config = compose(["system=lognormal", f"system/availability={option}"])
    assert config.system.availability._target_.lower().endswith(option)
