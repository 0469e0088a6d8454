"""The README's Python examples run as they stand there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import fedsim

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
METHOD = next(block for block in BLOCKS if "SignFedAvg" in block)


def test_the_notebook_example_runs_as_printed() -> None:
    scope: dict[str, object] = {}
    exec(BLOCKS[0], scope)
    result = scope["result"]
    assert isinstance(result, fedsim.RunResult)
    assert len(result.history) == 10
    assert set(result.per_client.columns) == {"round", "client", "metric", "value"}
    assert set(result.weights) == {"weight", "bias"}


def test_plain_torch_loads_and_predicts_from_the_folder() -> None:
    scope: dict[str, object] = {}
    exec(BLOCKS[0], scope)
    exec(BLOCKS[1], scope)
    names, model, result = (scope[k] for k in ("names", "model", "result"))
    assert len(BLOCKS[1].splitlines()) <= 10
    assert len(names) == 5 and set(names) <= {"0", "1", "2"}  # type: ignore[arg-type]
    assert torch.equal(model.weight, result.weights["weight"])  # type: ignore[attr-defined]


def test_the_pages_lines_for_plain_torch_give_what_the_model_of_the_result_gives(tmp_path: Path) -> None:
    page = (README.parent / "docs/using_results.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1]
    settings = ["engine=serial", "tracker=quiet", "rounds=1", "client.epochs=1", "num_clients=4"]
    result = fedsim.simulate([*settings, "clients_per_round=2", "model=mlp", f"dir={tmp_path}"])
    x = torch.randint(0, 17, (6, 1, 8, 8)).to(torch.uint8)
    scope = {"folder": tmp_path, "x": x, "model": result.model()}
    exec(code, scope)
    raw = (x.float() / 16 - 0.3053) / 0.3760
    assert scope["names"] == [str(i) for i in result.model()(raw).argmax(1).tolist()]


def test_the_method_of_ones_own_is_short_and_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = METHOD
    assert len(code.strip().splitlines()) < 30
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    from my_method import SignFedAvg

    method = SignFedAvg(server_lr=1.0, weighting="uniform")
    x, y = torch.tensor([[1.0, -2.0]]), torch.tensor([0])
    start = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    settings = ["engine=serial", "tracker=quiet", "rounds=2", "clients_per_round=1", "client.lr=0.003"]
    settings += ["client.epochs=1"]
    run = fedsim.simulate(
        settings, strategy=method, model=torch.nn.Linear(2, 2), clients=[(x, y)], initial=start
    )
    # the gradient's signs never change, so both rounds move by 0.003, the second 1.5 times with momentum 0.5
    step = 0.003 + 0.003 * 1.5
    expected = step * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(run.weights["weight"], expected)
    sys.modules.pop("my_method")


def test_the_yaml_of_ones_own_method_runs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.cli.main import command

    (tmp_path / "my_method.py").write_text(METHOD)
    (tmp_path / "my_conf/strategy").mkdir(parents=True)
    text = "_target_: my_method.SignFedAvg\nserver_lr: 1.0\nweighting: uniform\n"
    (tmp_path / "my_conf/strategy/sign.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = ["--config-dir", "my_conf", "strategy=sign", "engine=serial", "tracker=quiet", "rounds=2"]
    assert command([*arguments, "client.lr=0.003", "dir=run"]) == 0
    assert (tmp_path / "run/summary.json").exists()
    sys.modules.pop("my_method", None)
