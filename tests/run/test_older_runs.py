"""Folders that the version before the rooms left: reported, skipped, resumed and verified.

``golden/old_runs`` was written by that version: SCAFFOLD on blobs with simulated devices, a finished run of four rounds
(seed 0), one interrupted after two (seed 1), and the hashes of the latter's weights had it gone on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from composing import compose_quickly

from fedsim.cli.main import command
from fedsim.config.added import ADDED
from fedsim.config.compose import load
from fedsim.config.moved import as_before, as_today
from fedsim.config.roles import roles
from fedsim.errors import CheckpointError
from fedsim.report import group_runs, load_runs
from fedsim.run.key import finished, key_before, run_dir, run_key
from fedsim.tracking import read_rows

OLD = Path(__file__).parents[1] / "golden" / "old_runs"
STRAIGHT = json.loads((OLD / "straight.json").read_text())
NAMES = {"done": "scaffold-s0-b5993f83", "interrupted": "scaffold-s1-ece9f592"}
SETTINGS = [
    *(
        "strategy=scaffold",
        "data=blobs",
        "partition=iid",
        "model=linear",
        "system=lognormal",
        "engine=serial",
    ),
    *("data.num_samples=256", "data.num_test=64", "data.num_features=16", "data.num_classes=16"),
    *("num_clients=4", "clients_per_round=2", "client.lr=0.1", "client.epochs=1", "client.batch_size=16"),
    *("client.lr_decay=0.998", "client.weight_decay=0.001", "client.clip_norm=10.0"),
    *("tracker=quiet", "tracker.plots=false", "checkpoint.every=1", "rounds=4"),
]
FIXED = [
    "client.lr_decay=0.998",
    "client.weight_decay=0.001",
    "client.clip_norm=10.0",
]  # their defaults were others

same_machine = pytest.mark.skipif(
    (torch.backends.cpu.get_cpu_capability(), torch.__version__) != (STRAIGHT["cpu"], STRAIGHT["torch"]),
    reason=f"the weights were computed by torch {STRAIGHT['torch']} on {STRAIGHT['cpu']}",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "default"
    for kind, name in NAMES.items():
        shutil.copytree(OLD / kind, root / name)
    return root


def hashes(folder: Path) -> list[str]:
    return [row["weights_hash"] for row in read_rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize("overrides", json.loads((OLD / "keys.json").read_text()))
def test_todays_settings_give_the_key_of_before(overrides: str) -> None:
    expected = json.loads((OLD / "keys.json").read_text())[overrides]
    assert key_before(compose_quickly([*overrides.split(), *FIXED])) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        "strategy=fedspeed",  # pulls were split
        "strategy=ggeur strategy@strategy.base=fedprox encoder=identity",
        "strategy=ditto",
        "strategy=scaffold client.momentum=0.9",
        "strategy=moon",
    ],
)
def test_a_run_that_has_other_weights_since_is_none_of_before(overrides: str) -> None:
    """CHANGELOG.md, "Other bits than in 0.1.0": such a folder is neither skipped nor continued."""
    assert key_before(compose_quickly([*overrides.split(), *FIXED])) is None


def test_a_pull_of_before_was_split() -> None:
    recorded = {
        "strategy": {"_target_": "strategies.fedprox.FedProx"},
        "client": {"clip_norm": 10.0, "clip": "direction"},
    }
    assert as_today(recorded)["client"]["clip_pull"] == "split"
    assert as_before(as_today(recorded)) == recorded
    recorded["client"]["clip_norm"] = None
    assert as_today(recorded)["client"]["clip_pull"] == "whole"


def test_settings_that_came_since_are_known_as_such() -> None:
    """A new field of the schema needs a line in ``config.moved.ADDED``, or runs of before are not found again."""
    assert set(roles()) - set(ADDED) == set((OLD / "settings.txt").read_text().split())


def test_an_added_setting_is_filled_in_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.config.moved.ADDED", {"task": None, "client.new": 1, "embed.mode.x": 2})
    recorded = {"client": {"lr": 0.1}, "embed": None}
    today = as_today(recorded)
    assert today == {"client": {"lr": 0.1, "new": 1}, "embed": None, "task": None}
    assert as_before(today) == recorded
    assert as_before(today | {"task": "mine"}) is None


def test_an_added_option_belongs_to_its_class_at_any_depth() -> None:
    moon, prox = {"_target_": "strategies.moon.Moon", "mu": 1}, {"_target_": "strategies.fedprox.FedProx"}
    recorded = {"strategy": {"_target_": "strategies.ggeur.GGEUR", "base": moon}, "other": prox}
    today = as_today(recorded)
    assert today["strategy"]["base"] == {**moon, "contrast": "turn"} and today["other"] == prox
    assert as_before(today) == recorded
    today["strategy"]["base"]["contrast"] = "round"
    assert as_before(today) is None


def test_a_finished_run_of_before_is_skipped(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in (place / NAMES["done"]).rglob("*") if p.is_file()}
    assert command(SETTINGS) == 0
    assert f"already done, skipped: runs/default/{NAMES['done']}\n" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (place / NAMES["done"]).rglob("*") if p.is_file()} == before
    assert finished(compose_quickly([*SETTINGS, "client.lr=0.2"])) is None


@same_machine
def test_an_interrupted_run_of_before_goes_on_under_its_old_name(place: Path) -> None:
    folder = place / NAMES["interrupted"]
    assert run_dir(compose_quickly([*SETTINGS, "seed=1"])).absolute() == folder
    assert command([*SETTINGS, "seed=1"]) == 0
    assert hashes(folder) == STRAIGHT["weights_hash"]
    assert sorted(p.name for p in place.iterdir()) == sorted(NAMES.values())
    assert "fedsim.system.system.Dropout" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "summary.json").read_text())["key"] == run_key(load(folder / "config.yaml"))


@same_machine
def test_a_finished_run_of_before_is_extended_where_it_lies(place: Path) -> None:
    folder = place / NAMES["done"]
    assert command([*SETTINGS, "rounds=5", f"dir={folder}"]) == 0
    assert len(hashes(folder)) == 5 and hashes(folder)[:4] == hashes(OLD / "done")
    assert command([*SETTINGS, "rounds=5", "out=elsewhere"]) == 0
    (afresh,) = Path("elsewhere/default").iterdir()
    assert hashes(folder) == hashes(afresh)


@same_machine
def test_a_run_of_before_is_verified(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, rounds in (("done", 4), ("interrupted", 2)):
        assert command(["verify", str(place / NAMES[kind])]) == 0
        assert capsys.readouterr().out == f"{rounds} rounds identical\n"


def test_runs_of_before_and_of_today_stand_in_one_group(place: Path) -> None:
    assert command([*SETTINGS, "seed=2"]) == 0
    (group,) = group_runs(load_runs([place]))
    assert group.method == "scaffold" and group.settings == {}
    assert [(run.seed, run.status) for run in group.runs] == [(0, "done"), (1, "interrupted"), (2, "done")]
    assert command(["report", str(place)]) == 0


def test_another_run_in_the_folder_is_refused_as_ever(place: Path) -> None:
    import fedsim

    folder = place / NAMES["interrupted"]
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        fedsim.simulate([*SETTINGS, "seed=1", "client.lr=0.2", f"dir={folder}"])
    meta = folder / "checkpoint" / "round-000002" / "checkpoint.json"
    changed = json.loads(meta.read_text()) | {"key": "0" * 64}
    meta.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"belongs to another configuration \(key 00000000"):
        fedsim.simulate([*SETTINGS, "seed=1", f"dir={folder}"])
