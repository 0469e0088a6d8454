"""What reaches Ray's workers is what this process has in memory, not what its files hold by now."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from problems import classification, hashes, method
from torch.nn.functional import cross_entropy

from clients.base import Client
from fedsim.engine.ray import cluster
from fedsim.errors import EngineError

pytestmark = pytest.mark.slow
MODULE = """
import functools, threading
import torch.nn.functional as F
from clients.base import Client
rate = 1.0
def scaled(g):
    return rate * g
@functools.lru_cache
def cached():
    return 1.0
def late(o, y):
    import lent
    return lent.twice * F.cross_entropy(o, y)
def loss(o, y):
    return cached() * F.cross_entropy(o, y)
class Mine(Client):
    def step(self, job, w, batch):
        return w - 0.1 * scaled(job.grad(w, batch))
"""


@pytest.fixture
def lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lent.py").write_text(MODULE + "twice = 2\n")
    yield importlib.import_module("lent")
    del sys.modules["lent"]


def bits(engine: str, lent: Any, **given: Any) -> list[str]:
    strategy = method("fedavg")
    strategy.client = lent.Mine()
    return hashes(classification().run("rounds=1", engine, "engine.workers=1", strategy=strategy, **given))


def test_edits_patches_and_assignments_are_what_workers_run(ray: str, lent: Any, tmp_path: Path) -> None:
    seen = []

    def compare() -> None:
        here, there = bits("engine=serial", lent), bits(ray, lent)
        assert here == there
        seen.append(here[-1])

    compare()
    lent.rate = 0.5
    lent.Mine.begin = lambda self, job, w: w + 1
    (tmp_path / "lent.py").write_text(MODULE.replace("0.1", "0.3") + "twice = 2\n\n")  # not loaded here
    compare()
    del lent.Mine.begin
    compare()
    importlib.reload(lent)
    compare()
    assert len(set(seen)) == 4


def test_what_workers_must_import_is_refused_where_its_file_is_newer(
    ray: str, lent: Any, tmp_path: Path
) -> None:
    cluster.shutdown()  # workers look for modules where this process did when Ray was started
    assert bits(ray, lent, loss=lent.late) == bits("engine=serial", lent, loss=lent.late)
    cluster.shutdown()
    changed = MODULE.replace("1.0\ndef late", "3.0\ndef late")
    assert changed != MODULE
    (tmp_path / "lent.py").write_text(changed + "twice = 200\n\n")
    for loss in (lent.late, lent.loss):
        with pytest.raises(
            EngineError, match=r"import other code than this process runs, from one of lent: "
        ):
            bits(ray, lent, loss=loss)


def test_workers_have_the_variables_of_the_environment_that_the_code_asks_for(
    ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of idle workers are from when they were started."""

    def loss(o: Any, y: Any) -> Any:
        return float(os.environ.get("FEDSIM_TEST_SCALE", "1")) * cross_entropy(o, y)

    found = []
    for scale in (None, "2", None):
        monkeypatch.delenv("FEDSIM_TEST_SCALE", raising=False)
        if scale is not None:
            monkeypatch.setenv("FEDSIM_TEST_SCALE", scale)
        here, there = (
            hashes(classification().run("rounds=1", engine, "engine.workers=1", loss=loss))
            for engine in ("engine=serial", ray)
        )
        assert here == there
        found += here
    assert found[0] == found[2] != found[1]


@pytest.mark.nightly
def test_what_cannot_be_sent_is_imported_and_said(ray: str, lent: Any, tmp_path: Path) -> None:
    def again() -> list[str]:
        with pytest.warns(UserWarning, match=r"cannot be sent to Ray's workers .*_thread.lock"):
            return bits(ray, lent)

    code = "import threading\nlock = threading.Lock()\ndef scaled(g):\n    with lock:\n        return g\n"
    cluster.shutdown()  # workers look for modules where this process did when Ray was started
    (tmp_path / "lent.py").write_text(MODULE.split("rate")[0] + code + "class" + MODULE.split("class")[1])
    importlib.reload(lent)
    assert again() == bits("engine=serial", lent)
    lent.Mine.begin = lambda self, job, w: w + 1
    with pytest.raises(EngineError, match="import other code than this process runs, from one of lent,"):
        again()


def test_a_patched_class_of_ours_is_refused(ray: str, lent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "begin", lambda self, job, w: w + 1)
    with pytest.raises(EngineError, match=r"clients\.base\.Client\.begin was replaced in this process"):
        bits(ray, lent)


def test_the_suite_itself_travels_without_a_warning(ray: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        classification().run("rounds=1", ray, "engine.workers=1")
