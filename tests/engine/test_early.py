"""Workers forked from the driver compute until Ray's are ready: the same bits, and what goes wrong goes wrong alike."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hooks import Die, hooked
from problems import classification, hashes
from processes_alive import descendants, wait_until_gone

from clients.base import Client
from fedsim.data.dataset import Samples
from fedsim.engine.ray import cluster, engine, forked
from fedsim.errors import EngineError
from fedsim.local.job import Job

pytestmark = pytest.mark.slow
EARLY = cluster.early  # before it is replaced for other tests
RAY = ("engine=ray", "engine.workers=2", "engine.chunks=6")
ROUNDS = 4


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Ray is there, and none will be within a test's time."""
    cluster.shutdown()
    monkeypatch.setattr(cluster, "early", EARLY)
    monkeypatch.setattr(engine, "ALONE", 0.0)
    monkeypatch.setattr(cluster.OwnRay, "command", (sys.executable, "-c", "import time; time.sleep(3600)"))
    yield
    cluster.shutdown()


def run(*overrides: str, **given: Any) -> Any:
    return classification("dropout", cohorts=[range(6)] * ROUNDS).run(
        f"rounds={ROUNDS}", "engine.chunks=6", *overrides, **given
    )


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


def read(folder: Path) -> list[list[str]]:
    """Round, process, its parent and the switch, of each note."""
    return [path.name.split("-") for path in folder.iterdir()]


@dataclass(frozen=True)
class Note:
    """Leave a file named after round, process, its parent, and a switch of torch."""

    folder: Path

    def __call__(self, job: Job) -> None:
        words = (job.round, os.getpid(), os.getppid(), torch.get_float32_matmul_precision())
        (self.folder / "-".join(map(str, words))).touch()
        time.sleep(0.02)


def test_a_run_is_over_before_ray_is_there_and_leaves_nothing(notes: Path) -> None:
    others = descendants(os.getpid())  # of tests before
    result = run(*RAY, strategy=hooked("fedspeed", Note(notes)))
    assert hashes(result) == hashes(run("strategy=fedspeed"))
    assert {int(parent) for _, _, parent, _ in read(notes)} == {os.getpid()}
    assert len({pid for _, pid, _, _ in read(notes)}) == 2
    assert cluster.ours() and not cluster.connected(), "Ray is being started"
    left, start = [p for p in descendants(os.getpid()) if p not in others], time.monotonic()
    cluster.shutdown()
    assert time.monotonic() - start < 5, "it waits for no start"
    wait_until_gone(left)


def test_ray_that_cannot_be_started_is_said_and_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.OwnRay, "command", ("sh", "-c", "echo no room >&2"))
    monkeypatch.setattr(cluster, "starts", lambda config: bool(cluster._started(0).address()))
    with pytest.warns(UserWarning, match="no room; the workers forked from this process go on") as said:
        result = run(*RAY, "strategy=fedspeed")
    assert len(said) == 1
    assert hashes(result) == hashes(run("strategy=fedspeed"))


def test_ray_takes_over_between_two_exchanges(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third exchange waits for Ray's workers, which have the driver's switches."""
    exchanges, step = [0], engine.RayEngine._hand_over

    def patient(self: Any) -> None:
        exchanges[0] += 1
        step(self)
        while exchanges[0] > 2 and self._crew is not self._actors:
            time.sleep(0.05)
            step(self)

    monkeypatch.undo()
    monkeypatch.setattr(cluster, "early", EARLY)
    monkeypatch.setattr(engine, "ALONE", 0.0)
    monkeypatch.setattr(engine.RayEngine, "_hand_over", patient)
    variables, precision = dict(os.environ), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        result = run(*RAY, strategy=hooked("fedspeed", Note(notes)))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert dict(os.environ) == variables
    assert hashes(result) == hashes(run("strategy=fedspeed"))
    found = read(notes)
    forked = {n[1] for n in found if n[0] in "01"}
    assert {n[2] for n in found if n[1] in forked} == {str(os.getpid())}
    actors = {n[1] for n in found} - forked
    assert {n[1] for n in found if n[0] in "23"} == actors and actors
    assert {n[3] for n in found} == {"high"}
    wait_until_gone({int(pid) for pid in forked})
    assert hashes(run(*RAY, "strategy=fedspeed")) == hashes(result)  # on Ray's workers alone


def test_a_forked_worker_that_dies_costs_its_chunk(tmp_path: Path) -> None:
    found = run(*RAY, strategy=hooked("fedspeed", Die(3, tmp_path / "killed")))
    assert (tmp_path / "killed").exists()
    assert hashes(found) == hashes(run("strategy=fedspeed"))
    with pytest.raises(EngineError, match=r"clients \[1\].*lost 4 times"):
        run(*RAY, strategy=hooked("fedavg", Die(1, tmp_path / "again", always=True)))


def test_what_clients_print_is_marked_and_a_client_that_hangs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        EngineError, match=r"chunk 3 \(clients \[3\]\).* took longer than engine.timeout=2.0 s"
    ):
        run(*RAY, "engine.timeout=2", strategy=hooked("fedavg", _hang))
    assert "client 1: here" in capsys.readouterr().out.splitlines()
    assert not {pid for pid in descendants(os.getpid()) if pid in forks()}


def _hang(job: Job) -> None:
    if job.client == 1:
        print("here")
    if job.client == 3:
        time.sleep(3600)


def forks() -> set[int]:
    """Children that run this very command."""
    import psutil

    me = psutil.Process()
    return {p.pid for p in me.children() if p.cmdline() == me.cmdline()}


def test_what_ray_would_refuse_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "begin", lambda self, job, w: w + 1)
    with pytest.raises(EngineError, match=r"clients\.base\.Client\.begin was replaced in this process"):
        run(*RAY)


@pytest.mark.parametrize(
    ("changed", "possible"),
    [({}, True), ({"threads": 2}, False), ({"device": "cuda"}, False), ({"read": True}, False)],
)
def test_who_may_be_forked(changed: dict[str, Any], possible: bool) -> None:
    train = object() if changed.pop("read", False) else Samples(torch.zeros(2))
    dataset = SimpleNamespace(train=train, test=None)
    plan: Any = SimpleNamespace(
        **({"threads": 1, "device": "cpu", "data": SimpleNamespace(dataset=dataset)} | changed)
    )
    assert forked.possible(plan) is possible


def test_early_may_be_switched_off() -> None:
    config = SimpleNamespace(early=True, threads=1, address=None)
    assert EARLY(config)
    for name, value in (("early", False), ("threads", 2), ("address", "here:1")):
        assert not EARLY(SimpleNamespace(**vars(config) | {name: value}))
