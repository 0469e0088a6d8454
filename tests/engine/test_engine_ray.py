"""The Ray engine with real workers: deaths, errors, one copy of the message, kills and Ctrl-C of the driver."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import Die, Fail, hooked
from problems import Recorded, classification, hashes, network
from processes_alive import wait_until_gone

from clients.base import Client
from fedsim.errors import ClientError, EngineError
from fedsim.exchange.payload import Replies, Update
from fedsim.local.job import Job
from fedsim.server.round import Round
from fedsim.task.vectors import FlatModel
from strategies.base import State, Strategy

pytestmark = pytest.mark.slow
TWO = "engine.workers=2"


def test_a_worker_that_dies_costs_nothing_but_time(ray: str, tmp_path: Path) -> None:
    problem = classification("dropout", cohorts=[range(6)] * 3)
    settings = ["strategy=fedspeed", "rounds=3", "engine.chunks=6"]
    expected = hashes(problem.run(*settings))
    strategy = hooked("fedspeed", Die(3, tmp_path / "killed"))
    result = problem.run(*settings, ray, TWO, strategy=strategy)
    assert (tmp_path / "killed").exists()
    assert hashes(result) == expected
    assert all(not row["failures"] for row in result.rows)
    assert hashes(problem.run(*settings, ray, TWO)) == expected  # the workers are good for another run


def test_a_client_that_always_kills_its_worker_ends_the_run_by_name(ray: str, tmp_path: Path) -> None:
    problem = classification(cohorts=[[0, 1, 2]])
    strategy = hooked("fedavg", Die(1, tmp_path / "killed", always=True))
    with pytest.raises(EngineError, match=r"clients \[1\].*lost 4 times"):
        problem.run("rounds=1", "engine.chunks=3", ray, "engine.workers=1", strategy=strategy)


def test_idle_workers_that_died_between_two_runs_are_no_loss(ray: str, tmp_path: Path) -> None:
    problem = classification()
    pids = tmp_path / "pids"
    pids.mkdir()
    expected = hashes(problem.run(ray, TWO, strategy=hooked("fedavg", NotePid(pids))))
    for pid in pids.iterdir():
        os.kill(int(pid.name), signal.SIGKILL)
    assert len(list(pids.iterdir())) == 2
    assert hashes(problem.run(ray, TWO)) == expected


def test_a_worker_stuck_in_a_client_is_dropped_after_the_timeout(ray: str, tmp_path: Path) -> None:
    problem, pids = classification(cohorts=[range(6)] * 2), tmp_path / "pids"
    settings = ["rounds=2", "engine.chunks=6", ray, TWO]
    pids.mkdir()
    expected = hashes(problem.run(*settings))
    late = r"chunk 3 \(clients \[3\]\).* took longer than engine.timeout=5.0 s"
    with pytest.raises(EngineError, match=late):
        problem.run(*settings, "engine.timeout=5", strategy=hooked("fedavg", Hang(3, pids)))
    (stuck,) = (int(p.name) for p in pids.iterdir())
    wait_until_gone({stuck})
    assert hashes(problem.run(*settings, "engine.timeout=60")) == expected


@dataclass(frozen=True)
class Hang:
    """One client never comes to an end; a file is named after its process."""

    client: int
    folder: Path

    def __call__(self, job: Job) -> None:
        if job.client == self.client:
            (self.folder / str(os.getpid())).touch()
            time.sleep(3600)


@dataclass(frozen=True)
class NotePid:
    """Leave a file named after the worker's process."""

    folder: Path

    def __call__(self, job: Job) -> None:
        (self.folder / str(os.getpid())).touch()
        time.sleep(0.05)


def test_an_error_in_a_client_names_client_and_round_and_shows_the_traceback(ray: str) -> None:
    strategy = hooked("fedavg", Fail([4], rounds=[2]))
    problem = classification(cohorts=[range(6)] * 4)
    with pytest.raises(ClientError) as caught:
        problem.run(ray, TWO, strategy=strategy)
    text = str(caught.value)
    assert "client 4 failed in round 3" in text
    assert "Traceback" in text
    assert "hooks.py" in text
    assert "ValueError: client 4 has had enough" in text
    assert "failures.policy=skip" in text


def test_skipping_and_retrying_on_workers_is_what_it_is_in_process(ray: str, tmp_path: Path) -> None:
    problem = classification(cohorts=[range(6)] * 4)
    skip = "failures.policy=skip"
    here, there = (
        problem.run(skip, *engine, strategy=hooked("fedspeed", Fail([2], rounds=[1])))
        for engine in (["engine=serial"], [ray, TWO])
    )
    assert hashes(here) == hashes(there)
    assert [f["client"] for f in there.rows[1]["failures"]] == [2]

    undisturbed = hashes(problem.run("strategy=fedspeed"))
    once = hooked("fedspeed", Fail([2], marker=tmp_path / "failed"))
    retried = problem.run("failures.retries=1", ray, TWO, strategy=once)
    assert (tmp_path / "failed").exists()
    assert hashes(retried) == undisturbed


def test_writing_to_the_message_or_to_state_in_shared_memory_is_refused(ray: str) -> None:
    problem = classification(cohorts=[range(6)] * 2)
    for scribble in (_on_message, _on_state):
        strategy = hooked("fedspeed", scribble)
        with pytest.raises(ClientError, match=r"client 1 in round 1.*read-only"):
            problem.run("rounds=2", "failures.policy=skip", ray, TWO, strategy=strategy)


def _on_message(job: Job) -> None:
    if job.client == 1:
        job.anchor.mul_(2)


def _on_state(job: Job) -> None:
    if job.client == 1:
        job.state["h"].add_(1)


@pytest.mark.parametrize("near", [True, False], ids=["mapped", "object store"])
def test_message_and_plan_are_put_into_shared_memory_once(
    ray: str, near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray as library

    from fedsim.engine.assignments import Broadcast, Chunk, Plan
    from fedsim.engine.ray.transport.driver import Transport
    from fedsim.engine.ray.transport.memory import SUPPORTED, Block

    put: list[Any] = []
    plain, write = library.put, Block.write
    problem = classification(cohorts=[range(6)] * 3)
    if not near:
        monkeypatch.setattr(Transport, "open", lambda self, worker: None)
    problem.run(ray, TWO, "rounds=1")
    monkeypatch.setattr(library, "put", lambda value, *a, **k: put.append(value) or plain(value, *a, **k))
    monkeypatch.setattr(Block, "write", lambda self, value: put.append(value) or write(self, value))
    there = problem.run(ray, TWO, "rounds=3", "engine.chunks=6", "strategy=fedspeed")
    assert sum(isinstance(v, Plan) for v in put) == 1
    assert sum(isinstance(v, Broadcast) for v in put) == 3  # one a round, whatever the number of chunks
    assert sum(isinstance(v, Chunk) for v in put) == (18 if near and SUPPORTED else 0)
    monkeypatch.undo()
    assert hashes(there) == hashes(problem.run("rounds=3", "engine.chunks=6", "strategy=fedspeed"))


def test_workers_here_and_elsewhere_share_the_work(ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker is called by pipe, the other through Ray, as on a cluster."""
    from fedsim.engine.ray.transport.driver import Transport

    open_, by_pipe, sent = Transport.open, list[Any](), list[Any]()
    send = Transport.send

    def only_the_first(self: Transport, worker: Any) -> Any:
        if by_pipe:
            return None
        by_pipe.append(worker)
        return open_(self, worker)

    def noted(self: Transport, worker: Any, *call: Any) -> int:
        sent.append(worker in self._pipes)
        return send(self, worker, *call)

    monkeypatch.setattr(Transport, "open", only_the_first)
    monkeypatch.setattr(Transport, "send", noted)
    problem = classification(cohorts=[range(6)] * 3)
    settings = ["rounds=3", "engine.chunks=6", "strategy=fedspeed"]
    there = problem.run(ray, TWO, *settings)
    monkeypatch.undo()
    assert set(sent) == {True, False}
    assert hashes(there) == hashes(problem.run(*settings))


def test_tied_weights_stay_tied_in_workers(ray: str) -> None:
    clients = [(torch.randint(0, 5, (6, 3), generator=_generator(i)), torch.arange(6) % 5) for i in range(4)]
    problem = classification(model=Tied(), clients=clients, test=None)
    here, there = problem.run("clients_per_round=2"), problem.run("clients_per_round=2", ray, TWO)
    assert hashes(here) == hashes(there)
    assert torch.equal(there.weights["embed.weight"], there.weights["head.weight"])
    assert not torch.equal(there.weights["embed.weight"], Tied().embed.weight)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tied(torch.nn.Module):
    """Embedding and output layer share their weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = torch.nn.Embedding(5, 4)
            self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x).mean(1))


# -- a method of one's own ----------------------------------------------------------------------------------------


class SignClient(Client):
    """Sends the sign of its update and counts its rounds."""

    def init_state(self, layout: Any) -> dict[str, torch.Tensor]:
        return {"rounds": torch.zeros((), dtype=torch.int64)}

    def finish(self, job: Job, w: torch.Tensor) -> Update:
        sign = job.delta(w).sign()
        return Update({"delta": sign, "counts": torch.ones(2)}, state={"rounds": job.state["rounds"] + 1})


class SignVote(Strategy):
    """Moves by the majority sign."""

    client = SignClient()
    fold = {"delta": "sum", "counts": "stack"}  # noqa: RUF012

    def update(self, state: State, replies: Replies, round: Round) -> State:
        assert replies.stack("counts").shape == (len(replies), 2)
        return state | {"w": state["w"] + 0.01 * replies.total("delta").sign()}


def test_a_method_written_in_a_test_runs_on_both_engines(ray: str) -> None:
    runs = []
    for engine in (["engine=serial"], [ray, TWO]):
        strategy = Recorded(SignVote())
        result = classification().run("dtype=float64", *engine, strategy=strategy)
        runs.append((hashes(result), [int(k["rounds"]) if k else 0 for k in strategy.kept[-1]]))
        start = FlatModel(network(), torch.float64)
        moved = strategy.series("w")[0] - start.layout.compact(start.w).numpy()
        assert set(abs(moved).round(12)) <= {0.0, 0.01}
        seen = [c for row in result.rows for c in row["cohort"]]
        assert runs[-1][1] == [seen.count(c) for c in range(6)]
    assert runs[0] == runs[1]
