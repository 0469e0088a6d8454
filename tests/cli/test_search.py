"""Searches: the sweeper gets the objective of validation data, and what there is nothing to choose by is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from standin import Simulator, stand_in

from fedsim.cli.main import command


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulator:
    return stand_in(monkeypatch, tmp_path)


def test_optuna_sees_the_validation_accuracy_of_each_trial_also_of_those_done_before(
    simulator: Simulator,
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra 'sweep'")
    argv = ["-m", "experiment=search", "engine=serial", "hydra.sweeper.n_trials=3", "client.epochs=2"]

    def best() -> Any:
        return OmegaConf.load(next(Path("runs").rglob("optimization_results.yaml")))

    assert command(argv) == 0
    tried = [(c.client.lr, c.client.weight_decay) for c in simulator.ran]
    assert len({lr for lr, _ in tried}) == 3 and all(0.005 <= lr <= 0.5 for lr, _ in tried)
    assert {c.client.epochs for c in simulator.ran} == {2}
    assert best().best_value == 0.3 and best().best_params["client.lr"] in [lr for lr, _ in tried]
    assert command(argv) == 0
    assert len(simulator.ran) == 3, "the same seed proposes the same trials, which are done"
    assert best().best_value == 0.3, "not the test set's .9"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            "evaluation.validation=0",
            "tuning on test data: type evaluation.validation=0.1, or objective.on=test to do it knowingly",
        ),
        (
            "objective.metric=loss",
            "hydra.sweeper.direction=maximize: val/loss is to be minimized; type hydra.sweeper.direction=minimize, "
            "or objective.direction=max",
        ),
        (
            "strategy=fedper",
            "tuning without validation data (the method's results are the clients' own models): type "
            "evaluation.client_validation=0.1",
        ),
    ],
)
def test_a_search_that_can_choose_by_nothing_is_refused(
    simulator: Simulator, capsys: pytest.CaptureFixture[str], settings: str, expected: str
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra 'sweep'")
    assert command(["-m", "experiment=search", "engine=serial", "hydra.sweeper.n_trials=1", settings]) == 2
    assert f"fedsim: {expected}\n" in capsys.readouterr().err
    assert simulator.ran == []


def test_a_search_on_test_data_is_done_knowingly(simulator: Simulator) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra 'sweep'")
    told = ["evaluation.validation=0", "objective.on=test"]
    assert command(["-m", "experiment=search", "engine=serial", "hydra.sweeper.n_trials=1", *told]) == 0
    assert OmegaConf.load(next(Path("runs").rglob("optimization_results.yaml"))).best_value == 0.9
