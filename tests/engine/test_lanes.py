"""Lanes: several clients under way at once, the same bits as one by one; on a GPU with captured steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import Network, classification, hashes
from together import With
from torch import Tensor, nn

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.task.captured import Captured

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
PLACES = ["cpu", pytest.param("cuda", marks=CUDA)]
COHORT = {"cohorts": [range(6)] * 2}


class Normed(Network):
    """BatchNorm and dropout: statistics and masks that belong to one client."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("fedavg", ()),
        ("fedavg", ("client=adam", "client.epochs=2")),
        ("fedavg", ("client.clip_norm=null", "client.lr=0.1", "client.weight_decay=0.01")),
        ("scaffold", ("client.clip_norm=0.5",)),
        ("fedsam", ("client.momentum=0.5",)),
    ],
)
def test_the_number_of_lanes_changes_no_bit(device: str, strategy: str, settings: tuple[str, ...]) -> None:
    problem = classification(model=Normed, **COHORT)
    common = ("rounds=2", "engine.chunks=2", "engine.vectorize=off", f"engine.device={device}", *settings)
    found = {
        tuple(hashes(problem.run(f"strategy={strategy}", f"engine.lanes={n}", *common))) for n in (1, 2, 3)
    }
    assert len(found) == 1


@dataclass(frozen=True, kw_only=True)
class Troubled(SGDClient):
    """Client 1 refuses, client 4 fails at first in each process."""

    def fit(self, job: Job) -> Update:
        if job.client == 1:
            raise Refusal("not today")
        if job.client == 4:
            raise ValueError("broken")
        return super().fit(job)


def test_refusals_and_failures_on_lanes_are_the_clients_own() -> None:
    def run(lanes: int) -> Any:
        settings = ("engine.chunks=1", "failures.policy=skip", "failures.retries=1", f"engine.lanes={lanes}")
        return classification(**COHORT).run("rounds=2", *settings, strategy=With(Troubled))

    alone, beside = run(1), run(3)
    assert hashes(alone) == hashes(beside)
    for row in beside.rows:
        assert [(f["client"], f["kind"]) for f in row["failures"]] == [(1, "refused"), (4, "failed")]


@dataclass(frozen=True, kw_only=True)
class Stateful(SGDClient):
    """Keeps a vector of its own, by which it steps."""

    def init_state(self, layout: Any) -> dict[str, Tensor]:
        return {"v": torch.zeros(layout.dim)}

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return job.sgd(w, job.grad(w, batch).add_(job.state["v"], alpha=0.1))

    def finish(self, job: Job, w: Tensor) -> Update:
        return Update({"delta": job.delta(w)}, state={"v": w}, weight=1.0, metrics=job.report())


@pytest.mark.parametrize("device", PLACES)
def test_what_a_client_keeps_is_not_overwritten_by_the_next_one_in_its_lane(device: str) -> None:
    settings = ("rounds=2", "engine.chunks=1", f"engine.device={device}")
    runs = [
        classification(**COHORT).run(*settings, f"engine.lanes={n}", strategy=With(Stateful)) for n in (1, 2)
    ]
    assert hashes(runs[0]) == hashes(runs[1])


def test_without_a_gpu_nothing_is_captured() -> None:
    calls = []

    def square(x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        return (x * x,)

    captured = Captured(square)
    assert [captured(torch.tensor([float(i)]))[0].item() for i in range(5)] == [0, 1, 4, 9, 16]
    assert len(calls) == 5


@CUDA
def test_a_captured_computation_gives_the_same_bits_and_is_not_called_again() -> None:
    calls, layer = [], nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5)).cuda()

    def compute(x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        return (layer(x).square(),)

    x = [torch.randn(4, 5, device="cuda") for _ in range(8)]
    captured = Captured(compute)
    torch.cuda.manual_seed(3)
    plain = [compute(v)[0] for v in x]
    torch.cuda.manual_seed(3)
    found = [captured(v)[0].clone() for v in x]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    before = len(calls)
    captured(x[0])
    assert len(calls) == before


@CUDA
def test_what_waits_for_the_gpu_or_draws_on_the_host_is_computed_as_it_is() -> None:
    def waits(x: Tensor) -> tuple[Tensor]:
        return (x * x.sum().item(),)

    def draws(x: Tensor) -> tuple[Tensor]:
        return (x + torch.rand(()).item(),)

    x = torch.arange(3.0, device="cuda")
    for compute in (waits, draws):
        captured = Captured(compute)
        torch.manual_seed(0)
        plain = [compute(x)[0] for _ in range(5)]
        torch.manual_seed(0)
        found = [captured(x)[0].clone() for _ in range(5)]
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@CUDA
def test_a_gpu_agrees_with_the_cpu_to_rounding() -> None:
    a, b = (
        classification(**COHORT).run("rounds=2", "engine.vectorize=off", f"engine.device={d}").weights
        for d in ("cpu", "cuda")
    )
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6)
