"""Models that clients handed over once, as files: found again, damaged, of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import Fail, hooked
from one_shot_settings import METHODS
from problems import classification, hashes
from safetensors.torch import load_file, save_file

import fedsim
from fedsim.config.compose import compose
from fedsim.errors import CheckpointError, ConfigError
from fedsim.run.key import run_key
from fedsim.run.resolve import resolve


def run(name: str, *overrides: str, **given: Any) -> fedsim.RunResult:
    options = (f"strategy={name}", *METHODS[name], "evaluation.every=1", *overrides)
    strategy = given.pop("strategy", None)
    return classification(**given).run(*options, strategy=strategy)


def test_models_of_a_named_run_are_taken(tmp_path: Path) -> None:
    first = run("one_shot", "rounds=1", f"out={tmp_path}/a")
    other = run("dense", "rounds=1", f"strategy.uploads={first.dir}", f"out={tmp_path}/b")
    assert other.summary["uploads_hash"] == first.summary["uploads_hash"]
    assert not (tmp_path / "b" / "uploads").exists()
    with pytest.raises(
        ConfigError, match="where devices are simulated, and in a deployment, clients are asked"
    ):
        run("dense", f"strategy.uploads={first.dir}", "system=lognormal", f"out={tmp_path}/b")
    with pytest.raises(ConfigError, match=r"strategy\.uploads=.*there is no uploads/uploads\.json"):
        run("dense", f"strategy.uploads={tmp_path}/none")


def test_models_of_some_clients_are_none_of_all(tmp_path: Path) -> None:
    """What a run with cohorts of its own asked for is no answer to who asks everybody, and the other way round."""
    for cohorts, expected in (([[1], []], 1), (None, 6), ([[1, 4], []], 2), (None, 6)):
        found = run("dense", "rounds=2", f"out={tmp_path}", cohorts=cohorts)
        assert found.rows[0]["models"] == expected


def test_damaged_models_are_made_again_and_lost_ones_are_named(tmp_path: Path) -> None:
    first = run("one_shot", "rounds=1", f"out={tmp_path}", f"dir={tmp_path}/run", "checkpoint.every=1")
    (shared,) = (tmp_path / "uploads").iterdir()
    (shared / "3.safetensors").unlink()
    (shared / "3.safetensors").write_bytes(b"no model")
    second = run("one_shot", "rounds=1", f"out={tmp_path}")
    assert hashes(second) == hashes(first)
    for path in (tmp_path / "run" / "uploads").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"the models that this run began with .* are missing"):
        run("one_shot", "rounds=2", f"out={tmp_path}", f"dir={tmp_path}/run")


@pytest.mark.parametrize("part", ["samples", "clients", "model", "tensor", "cost", "accuracy", "foreign"])
def test_a_named_folder_that_is_not_what_was_written_is_refused(part: str, tmp_path: Path) -> None:
    """Lines and costs too have a hash; missing models are not quietly made again, foreign clients refused."""
    first = run("one_shot", "rounds=1", f"out={tmp_path}/a")
    path = first.dir / "uploads" / "uploads.json"
    index = json.loads(path.read_text())
    words, said = [f"strategy.uploads={first.dir}", "rounds=1"], "is not what was written, by its hash"
    if part == "samples":
        index["clients"][0]["samples"] = 100.0
    elif part == "clients":
        index["clients"].pop()
    elif part == "model":
        (path.parent / "2.safetensors").unlink()
        said = "a model is missing"
    elif part == "tensor":
        model = path.parent / "2.safetensors"
        save_file({**load_file(model), "more": torch.zeros(1)}, model)
    elif part == "cost":
        index["outcomes"][0]["bytes_up"] = 1
    elif part == "accuracy":
        index["clients"][0]["train_accuracy"] = 0.123
    else:
        words, said = [*words, "exclude=[1]"], "holds the model of client 1, who is not there"
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=said):
        run("dense", *words, f"out={tmp_path}/b")


def test_models_of_who_failed_stay_their_own_run_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client that fails once: the next run asks again, also where an older fedsim shared such models; then all find
    the same."""
    hook = Fail([2], marker=tmp_path / "failed")
    found: list[fedsim.RunResult] = []
    for name in ("one_shot", "dense", "feddf"):
        words = ("failures.policy=skip", "rounds=1", f"out={tmp_path}")
        caplog.clear()
        found.append(run(name, *words, strategy=hooked(name, hook, *METHODS[name])))
        said = [r.getMessage() for r in caplog.records]
        assert any("client 2 failed or sent no finite numbers" in text for text in said) == (len(found) == 1)
        assert any("asked for again" in text for text in said) == (len(found) == 2)
        if len(found) == 1:
            own = found[0].dir / "uploads"
            key = json.loads((own / "uploads.json").read_text())["key"]
            shutil.copytree(own, tmp_path / "uploads" / key, dirs_exist_ok=True)
    assert [r.rows[0]["models"] for r in found] == [5, 6, 6]
    assert [len(r.rows[0]["failures"]) for r in found] == [1, 0, 0]
    assert found[0].summary["uploads_hash"] != found[1].summary["uploads_hash"]
    assert found[1].summary["uploads_hash"] == found[2].summary["uploads_hash"]
    again = run("dense", f"strategy.uploads={found[0].dir}", "rounds=1", f"out={tmp_path}/b")
    assert again.rows[0]["models"] == 5  # by name they may be had


def test_other_models_in_a_named_folder_are_another_run(tmp_path: Path) -> None:
    named, keys = tmp_path / "named", []
    words = ["strategy=dense", f"strategy.uploads={named}"]
    for seed in (0, 1):
        shutil.rmtree(named, ignore_errors=True)
        found = run("one_shot", "rounds=1", f"seed={seed}", f"out={tmp_path}")
        shutil.copytree(found.dir / "uploads", named)
        keys.append(run_key(resolve(compose(words))))
    assert keys[0] != keys[1] == run_key(resolve(compose(words)))


def test_models_of_other_settings_are_named_and_refused_where_they_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run("one_shot", "rounds=1", f"out={tmp_path}/a")
    words = (f"strategy.uploads={first.dir}", "rounds=1", f"out={tmp_path}/b")
    run("dense", *words)
    assert "strategy.uploads" not in caplog.text
    run("dense", *words, "evaluation.validation=0.3")
    assert "models were trained on other samples than this run's split gives" in caplog.text
    run("dense", *words, "client.lr=0.3")
    assert "trained under other settings of clients" in caplog.text
    with pytest.raises(ConfigError, match=r"may have seen the samples that strategy\.proxy=0\.3 keeps"):
        run("fens", *words, "strategy.proxy=0.3")
