"""docs/own_data.md, followed literally: its Python, its run.toml and its nodes, on a grid in this process."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import LocalGrid
from real import ROOT

from fedsim.flower import nodes as nodes_module
from fedsim.flower import server
from fedsim.flower.options import configuration

PAGE = (ROOT / "docs/own_data.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
WORKED = [head for head, body in EXAMPLES.items() if "```toml" in body]


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


def test_there_is_an_example_of_each_kind() -> None:
    assert len(WORKED) == 5
    assert all(blocks(EXAMPLES[head], "python") and blocks(EXAMPLES[head], "sh") for head in WORKED)


@pytest.mark.parametrize("head", WORKED)
def test_the_examples_run_as_they_stand(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = served(head, tmp_path, monkeypatch)
    assert len(result.rows) == 2 and [row["cohort"] for row in result.rows] == [[0, 1]] * 2
    told = json.loads((result.dir / "contract.json").read_text())
    assert len(told["classes"]) == result.summary.get("num_classes", len(told["classes"]))
    assert told["normalize"] and set(told["nodes"]) == {"0", "1"}
    about = json.loads((result.dir / "model.json").read_text())
    assert about["classes"] == told["classes"]


def test_models_of_who_has_own_data_are_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their samples cannot be looked at here, and nothing is said of how they are split."""
    result = served(WORKED[0], tmp_path, monkeypatch, "strategy=one_shot")
    assert [row["cohort"] for row in result.rows] == [[0, 1], []]
    lines = json.loads((result.dir / "uploads" / "uploads.json").read_text())["clients"]
    assert [(line["split"], sum(line["class_counts"])) for line in lines] == [
        (None, line["samples"]) for line in lines
    ]
    assert {(line["train_accuracy"], line["own_test_accuracy"]) for line in lines} == {(None, None)}
    assert json.loads((result.dir / "disjoint.json").read_text())["disjoint"] is None


def served(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> Any:
    """What an example comes to, with ``more`` settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    body = EXAMPLES[head]
    for code in blocks(body, "python"):
        if module := re.match(r"# (\w+\.py)\n", code):
            Path(module[1]).write_text(code)
        else:
            exec(compile(code, head, "exec"), {})
    run_config = tomllib.loads(blocks(body, "toml")[0])
    lines = [shlex.split(line) for line in blocks(body, "sh")[0].splitlines()]
    config: list[dict[str, Any]] = [
        parse_config_args([line[line.index("--node-config") + 1]]) for line in lines
    ]
    run_config["overrides"] += f" {more} tracker=quiet engine.poll=0.001"
    grid = LocalGrid(run_config, {10 + k: dict(c) for k, c in enumerate(config)})
    return server.serve(grid, configuration(run_config))
