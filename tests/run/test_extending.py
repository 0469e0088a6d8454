"""``rounds`` is no part of a run unless a schedule depends on it: a finished run is extended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from omegaconf import OmegaConf
from problems import classification, hashes

from fedsim.errors import CheckpointError, ConfigError
from fedsim.run.key import finished, horizon, run_dir, run_key
from fedsim.server.loop import Loop
from strategies.fedavg import FedAvg


class Scheduled(FedAvg):
    """A method with a schedule over the whole run."""

    traits = replace(FedAvg.traits, horizon=True)


FRAUG = ["strategy=fraug", "model=digits_cnn"]
SCHEDULED = [f"strategy._target_={__name__}.Scheduled"]


@pytest.mark.parametrize("settings", [["strategy=scaffold"], ["strategy=fedcm", "evaluation.every=2"]])
def test_an_extended_run_has_the_bits_of_one_run_straight_through(
    tmp_path: Path, settings: list[str]
) -> None:
    straight = classification().run(*settings, "rounds=5")
    place = [*settings, f"dir={tmp_path}"]
    first = classification().run(*place, "rounds=3")
    longer = classification().run(*place, "rounds=5")
    assert [r["round"] for r in longer.rows] == [1, 2, 3, 4, 5]
    assert hashes(longer) == hashes(straight) and hashes(longer)[:3] == hashes(first)
    assert (longer.summary["rounds"], longer.summary["status"]) == (5, "done")
    assert longer.summary["weights_hash"] == straight.summary["weights_hash"]
    assert "rounds: 5" in (tmp_path / "config.yaml").read_text()


def test_fewer_rounds_than_are_there_run_nothing_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = classification().run(f"dir={tmp_path}", "rounds=4")
    fewer = classification().run(f"dir={tmp_path}", "rounds=2")
    assert hashes(fewer) == hashes(whole) and fewer.summary["rounds"] == 4
    said = "has 4 rounds; report --until 2 reads the first 2, weights of round 2 are not kept"
    assert f"{tmp_path} ({said})" in caplog.text
    assert "rounds: 4" in (tmp_path / "config.yaml").read_text()


def test_where_a_checkpoint_of_the_round_was_kept_it_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classification().run(f"dir={tmp_path}", "rounds=4", "checkpoint.keep=every:2")
    classification().run(f"dir={tmp_path}", "rounds=2")
    assert "weights of round 2 are in checkpoint/round-000002" in caplog.text


def test_a_run_under_way_cannot_be_ended_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Loop._round

    def interrupted(self: Any) -> None:
        if self.done == 3:
            raise KeyboardInterrupt
        plain(self)

    with monkeypatch.context() as during:
        during.setattr(Loop, "_round", interrupted)
        with pytest.raises(KeyboardInterrupt):
            classification().run(f"dir={tmp_path}", "rounds=5")
    for rounds in (2, 3):
        with pytest.raises(
            CheckpointError, match=rf"holds 3 of 5 rounds, not fewer than rounds={rounds}; give"
        ):
            classification().run(f"dir={tmp_path}", f"rounds={rounds}")
    straight, resumed = classification().run("rounds=4"), classification().run(f"dir={tmp_path}", "rounds=4")
    assert hashes(resumed) == hashes(straight)


def test_a_run_that_stopped_at_its_target_stays_finished(tmp_path: Path) -> None:
    settings = [
        "evaluation.every=1",
        "evaluation.target=0",
        "evaluation.stop_at_target=true",
        f"dir={tmp_path}",
    ]
    first = classification().run(*settings, "rounds=3")
    again = classification().run(*settings, "rounds=5")
    assert first.summary["rounds"] == again.summary["rounds"] == 1


def test_a_schedule_over_the_whole_run_makes_rounds_part_of_it(tmp_path: Path) -> None:
    def keys(*settings: str) -> int:
        return len({run_key(compose_quickly([*settings, f"rounds={r}"])) for r in (4, 5)})

    assert keys() == 1 and not horizon(compose_quickly())
    assert keys(*FRAUG) == keys(*SCHEDULED) == 2
    inside = ["strategy=ggeur", "strategy@strategy.base=fedavg"]
    assert keys(*inside) == 1
    assert keys(*inside, f"strategy.base._target_={__name__}.Scheduled") == 2


def test_a_schedule_of_a_strategy_handed_over_counts_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"server_lr": 1.0, "weighting": "samples"}
    places = {kind: f"dir={tmp_path / kind.__name__}" for kind in (FedAvg, Scheduled)}
    for kind, place in places.items():
        classification().run(place, strategy=kind(**options))
    longer = classification().run(places[FedAvg], "rounds=5", strategy=FedAvg(**options))
    assert longer.summary["rounds"] == 5
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        classification().run(places[Scheduled], "rounds=5", strategy=Scheduled(**options))


def test_only_as_many_rounds_as_wanted_are_finished(tmp_path: Path) -> None:
    def config(rounds: int, *more: str) -> Any:
        return compose_quickly([f"rounds={rounds}", f"out={tmp_path}", *more])

    folder = run_dir(config(3))
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"status": "done", "rounds": 3}))
    OmegaConf.save(config(3), folder / "config.yaml", resolve=True)
    assert str(finished(config(3))) == str(folder)
    assert finished(config(4)) is None
    assert str(finished(config(2))) == (
        f"{folder} (has 3 rounds; report --until 2 reads the first 2, weights of round 2 are not kept)"
    )
    assert finished(config(3, "client.lr=0.7")) is None


def test_cohorts_that_were_given_for_more_rounds_are_gone_on_with(tmp_path: Path) -> None:
    cohorts = [[0, 1], [2], [3, 4, 5], [1, 2], [0, 5]]
    problem = classification(cohorts=cohorts)
    straight = problem.run("rounds=5")
    problem.run(f"dir={tmp_path}", "rounds=2")
    assert hashes(problem.run(f"dir={tmp_path}", "rounds=5")) == hashes(straight)
    with pytest.raises(ConfigError, match="cohorts"):
        problem.run(f"dir={tmp_path}", "rounds=6")
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        problem.run(f"dir={tmp_path}", "rounds=6", cohorts=[*cohorts, [0]])


def test_peers_that_start_by_themselves_go_on_as_if_never_stopped(tmp_path: Path) -> None:
    settings = ["strategy=gossip_async", "topology=ring", "system=lognormal"]
    straight = classification().run(*settings, "rounds=5")
    classification().run(*settings, f"dir={tmp_path}", "rounds=2")
    longer = classification().run(*settings, f"dir={tmp_path}", "rounds=5")
    assert hashes(longer) == hashes(straight)
    assert [r["sim_seconds"] for r in longer.rows] == [r["sim_seconds"] for r in straight.rows]
