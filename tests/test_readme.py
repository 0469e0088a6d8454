"""The README is short and what it shows runs; so do the Python examples of the pages that it leads to."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import fedsim

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


(EXAMPLE,) = blocks("README.md")
BLOCKS = blocks("docs/from_python.md")
(METHOD,) = blocks("docs/own_method.md")


def test_the_readme_is_two_screens_with_the_two_commands_and_the_layout_as_it_is() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z]+)", text)
    assert set(named) >= {"run", "test", "docs"} and set(named) <= set(targets)
    layout = text.partition("## Layout")[2]
    rooms = {f.name for f in (ROOT / "fedsim").iterdir() if (f / "__init__.py").exists()}
    folders = {"conf", "strategies", "clients", "fedsim", "experiments", "benchmarks"}
    assert set(re.findall(r"\b([a-z]+)/", layout)) == rooms | folders


def test_the_readmes_methods_are_those_that_there_are() -> None:
    known = {file.stem for file in (ROOT / "conf/strategy").glob("*.yaml")}
    table = (ROOT / "README.md").read_text().partition("## Methods")[2].partition("## Layout")[0]
    cells = [
        line.split("|")[2]
        for line in table.splitlines()
        if line.startswith("| [") and "aggregator" not in line
    ]
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) <= known
    page = (ROOT / "docs/methods.md").read_text()
    listed = re.findall(
        r"`(\w+)`", " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    )
    assert sorted(listed) == sorted(known), "every method once in docs/methods.md"


def test_the_example_is_the_one_of_the_page_on_python_and_runs_as_printed() -> None:
    assert BLOCKS[0] == EXAMPLE
    scope: dict[str, object] = {}
    exec(EXAMPLE, scope)
    result = scope["result"]
    assert isinstance(result, fedsim.RunResult)
    assert len(result.history) == 10
    assert set(result.per_client.columns) == {"round", "client", "metric", "value"}
    assert set(result.weights) == {"weight", "bias"}


def test_the_first_task_of_ones_own_learns() -> None:
    (code,) = blocks("docs/tasks_and_data.md")
    scope: dict[str, object] = {}
    exec(code, scope)
    history = scope["result"].history  # type: ignore[attr-defined]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] and 0 <= history["farther"].iloc[-1] < 1


def test_plain_torch_loads_and_predicts_from_the_folder() -> None:
    scope: dict[str, object] = {}
    exec(BLOCKS[0], scope)
    exec(BLOCKS[1], scope)
    names, model, result = (scope[k] for k in ("names", "model", "result"))
    assert len(BLOCKS[1].splitlines()) <= 10
    assert len(names) == 5 and set(names) <= {"0", "1", "2"}  # type: ignore[arg-type]
    assert torch.equal(model.weight, result.weights["weight"])  # type: ignore[attr-defined]


def test_the_pages_lines_for_plain_torch_give_what_the_model_of_the_result_gives(tmp_path: Path) -> None:
    code = blocks("docs/using_results.md")[1]
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
    (text,) = re.findall(r"`(\{_target_: .*\})`", (ROOT / "docs/own_method.md").read_text())
    (tmp_path / "my_conf/strategy/sign.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = ["--config-dir", "my_conf", "strategy=sign", "engine=serial", "tracker=quiet", "rounds=2"]
    assert command([*arguments, "client.lr=0.003", "dir=run"]) == 0
    assert (tmp_path / "run/summary.json").exists()
    sys.modules.pop("my_method", None)
