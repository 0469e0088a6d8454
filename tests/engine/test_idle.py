"""Workers kept between runs: used again, unless this process has loaded code anew since."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.engine.ray import idle
from fedsim.engine.ray.actors import gpu_share


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported, and is not yet."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(idle, "_kept", [])
    (tmp_path / "edited_module.py").write_text("x = 1\n")
    yield "edited_module"
    sys.modules.pop("edited_module", None)


def test_workers_are_used_again_as_long_as_nothing_is_reloaded(module: str) -> None:
    ended: list[str] = []
    none, code = idle.take(2, ended.append)
    assert none == []
    importlib.import_module(module)  # the run imports it here, and its workers do so there
    idle.keep(["a", "b", "c"], code)
    taken, code = idle.take(2, ended.append)
    assert taken == ["a", "b"]
    idle.keep(taken, code)
    assert idle.take(9, ended.append)[0] == ["c", "a", "b"]
    assert ended == []


@pytest.mark.parametrize("way", ["reload", "import again"])
def test_workers_that_may_have_imported_a_reloaded_module_are_ended(module: str, way: str) -> None:
    ended: list[str] = []
    _, code = idle.take(1, ended.append)
    loaded = importlib.import_module(module)
    idle.keep(["a"], code)
    if way == "reload":
        importlib.reload(loaded)
    else:
        del sys.modules[module]
        taken, code = idle.take(1, ended.append)
        assert taken == ["a"], "it is not imported here at present"
        idle.keep(taken, code)
        importlib.import_module(module)
    taken, code = idle.take(1, ended.append)
    assert (taken, ended) == ([], ["a"])
    idle.keep(["b"], code)
    assert idle.take(1, ended.append)[0] == ["b"]


def test_a_module_reloaded_during_a_run_makes_its_workers_old(module: str) -> None:
    loaded = importlib.import_module(module)
    ended: list[str] = []
    _, code = idle.take(1, ended.append)
    importlib.reload(loaded)
    idle.keep(["a"], code)
    assert idle.take(1, ended.append)[0] == [] and ended == ["a"]


@pytest.mark.parametrize("gpus", range(1, 9))
@pytest.mark.parametrize("workers", [*range(1, 20), 64])
def test_every_worker_finds_room_on_a_gpu(gpus: int, workers: int) -> None:
    """Ray takes shares of one GPU or whole GPUs, counts in parts of 1/10000, and splits no share over GPUs."""
    share = gpu_share(workers, gpus)
    assert 0 < share <= 1
    parts = round(share * 10_000)
    assert parts == pytest.approx(share * 10_000, abs=1e-6)
    assert (10_000 // parts) * gpus >= workers
    assert gpu_share(workers, 0) == 0
