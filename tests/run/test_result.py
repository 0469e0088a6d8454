"""A result in use: the trained model again, from this process or from a folder, and what a cell shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from problems import classification, network
from safetensors.torch import load_file, save_file
from torch import nn

import fedsim
from fedsim.errors import CheckpointError, ConfigError
from fedsim.task.standalone import standalone

TINY = (
    "engine=serial",
    "tracker=quiet",
    "rounds=1",
    "client.epochs=1",
    "num_clients=4",
    "clients_per_round=2",
)


def test_the_model_is_the_trained_one_by_itself() -> None:
    problem = classification("bn")
    result = problem.run()
    model = result.model()
    assert type(model) is type(problem.model) and not model.training
    x, y = problem.test  # type: ignore[misc]
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).double().mean()
    assert result.summary["accuracy"] == pytest.approx(float(accuracy))
    with torch.no_grad():
        model[0].weight.zero_()
    assert result.weights["0.weight"].any() and result.model()[0].weight.any()


def test_a_tied_model_stays_tied_and_a_double_run_is_double() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.b(self.a(x)))

    model = classification(model=Tied).run("dtype=float64").model()
    assert model.a.weight is model.b.weight and model.a.weight.dtype == torch.float64


def test_a_folder_of_a_configured_run_is_enough(tmp_path: Path) -> None:
    result = fedsim.simulate([*TINY, f"dir={tmp_path}", "model=mlp"])
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    again = fedsim.load_run(moved)
    assert again.summary == json.loads((moved / "summary.json").read_text())
    for name, value in again.model().state_dict().items():
        assert torch.equal(value, result.weights[name])
    about = json.loads((moved / "model.json").read_text())
    assert about["class"] == "fedsim.models.dense.MLP" and about["model"]["_target_"] == "fedsim.models.MLP"
    assert about["input"] == {"shape": [1, 8, 8], "dtype": "float32"}
    assert about["classes"] == [str(i) for i in range(10)]
    assert about["normalize"] == {"scale": 1 / 16, "mean": [0.3053], "std": [0.3760]}
    (moved / "model.json").unlink()  # as of a run by a version before
    assert torch.equal(next(fedsim.load_run(moved).model().parameters()), next(result.model().parameters()))


def test_a_model_handed_over_is_needed_again_and_must_have_the_same_structure(tmp_path: Path) -> None:
    result = classification().run(f"dir={tmp_path}")
    with pytest.raises(ConfigError, match=r"handed over in Python; hand it over again: fedsim\.load_run\("):
        fedsim.load_run(tmp_path).model()
    fresh = fedsim.load_run(tmp_path, model=lambda: network())
    assert torch.equal(fresh.model()[0].weight, result.weights["0.weight"])
    for wrong, said in (
        (network("bn"), r"Network has no '2\.(weight|bias)'"),
        (network("tanh", 9), r"'0\.weight' has shape \(5, 9\) in Network, but \(5, 4\)"),
        (nn.Linear(4, 3), r"Linear has no '0\.(weight|bias)', which the run's weights have"),
    ):
        with pytest.raises(ConfigError, match=said):
            fedsim.load_run(tmp_path, model=wrong).model()


def test_weights_without_the_frozen_part_go_into_a_model_that_has_it() -> None:
    model = network()
    model[0].requires_grad_(False)
    part = {k: v + 1 for k, v in model.state_dict().items() if not k.startswith("0.")}
    made = standalone(model, part, torch.float32, frozen_apart=True)
    assert torch.equal(made[0].weight, model[0].weight) and torch.equal(made[2].bias, part["2.bias"])
    with pytest.raises(ConfigError, match=r"have no '0\.weight'"):
        standalone(model, part, torch.float32)
    del part["2.bias"]
    with pytest.raises(ConfigError, match=r"have no '2\.bias'"):
        standalone(model, part, torch.float32, frozen_apart=True)


def test_what_is_no_finished_run_or_was_changed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        fedsim.load_run(tmp_path / "none")
    with pytest.raises(ConfigError, match="no run folder"):
        fedsim.load_run(tmp_path)
    place = tmp_path / "run"
    classification().run(f"dir={place}")
    save_file(
        {k: v + 1 for k, v in load_file(place / "weights.safetensors").items()}, place / "weights.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"is not the file that model\.json beside it describes"):
        fedsim.load_run(place)
    (place / "weights.safetensors").unlink()
    with pytest.raises(ConfigError, match="not finished"):
        fedsim.load_run(place)


def test_a_cell_shows_a_line_or_a_small_table() -> None:
    result = classification().run("rounds=2")
    line, table = repr(result), result._repr_html_()
    assert line.startswith("RunResult(fedavg, rounds=2, accuracy=") and str(result.dir) in line
    assert "tensor" not in line and len(line) < 300
    assert "<th>method</th><td>fedavg</td>" in table and len(table) < 600


def test_best_weights_need_validation_data() -> None:
    with pytest.raises(ConfigError, match=r"type evaluation\.validation=0\.1"):
        classification().run().model(best=True)
    with pytest.raises(ConfigError, match="at='first': choose one of last, best_val"):
        classification().run().model(at="first")
