"""What fails while clients are computed at once: the chunk is done one by one, the others as before."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from problems import classification, hashes
from together import DeclaredClient, With, run
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class ChunkOfTwoFails(DeclaredClient):
    """Fails in a chunk of two clients in the second round."""

    vectorisable = True

    def begin(self, job: Job, w: Tensor) -> Tensor:
        if job.round == 1 and w.dim() == 2 and len(w) == 2:
            raise ValueError("not two of us")
        return w


FOUR_ROUNDS = ("rounds=4", "dtype=float64", "engine.chunks=2", "engine.vectorize=on")
COHORTS = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]


def failing(*settings: str) -> Any:
    problem = classification(cohorts=COHORTS)
    return problem.run(*FOUR_ROUNDS, *settings, strategy=With(ChunkOfTwoFails))


def test_only_the_chunk_that_failed_runs_one_by_one(trained: list[set[int]]) -> None:
    with pytest.warns(UserWarning, match=r"in round 2 run one by one, .*\(ValueError: not two of us\)"):
        failing()
    assert [len(t) for t in trained].count(0) == 1
    assert sorted(len(t) for t in trained[2:4]) in ([0, 3], [0, 4])
    assert all(trained[4:])


@pytest.mark.slow
def test_a_failure_gives_the_same_bits_whoever_computes_what(ray: str) -> None:
    with pytest.warns(UserWarning, match="not two of us"):
        expected = hashes(failing())
    for workers in (1, 2):
        assert hashes(failing(ray, f"engine.workers={workers}")) == expected


@dataclass(frozen=True, kw_only=True)
class FailsOnce(DeclaredClient):
    """The first update of client 2 lacks its array; how often each client was finished is noted."""

    vectorisable = True

    def finish(self, job: Job, w: Tensor) -> Update:
        FINISHED.clients.append(job.client)
        update = super().finish(job, w)
        return (
            Update(metrics=update.metrics) if job.client == 2 and FINISHED.clients.count(2) == 1 else update
        )


FINISHED = SimpleNamespace(clients=[])


def test_a_retry_computes_again_and_alone() -> None:
    FINISHED.clients.clear()
    result = run(FailsOnce, "engine.vectorize=on", "failures.retries=1")
    first = FINISHED.clients[:8]  # the retry is done twice, since the client changes a list of others
    assert sorted(first) == [0, 1, 2, 2, 2, 3, 4, 5]
    assert not result.rows[0]["failures"]
    retries = result.per_client.query("metric == 'retries'")
    assert retries[["round", "client", "value"]].values.tolist() == [[1, 2, 1.0]]


def test_what_a_declared_client_returns_is_checked() -> None:
    returning = type("Returning", (DeclaredClient,), {"vectorisable": True, "finish": lambda self, job, w: w})
    with (
        pytest.warns(UserWarning, match=r"Returning.finish returned Tensor of shape .*, expected an Update"),
        pytest.raises(ClientError),
    ):
        run(returning, "engine.vectorize=on")
