"""What model, loss, metrics or clients keep outside of layers and states is refused or said by name before it passes to
others; what writes to its inputs is given copies, and nobody writes to the samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plainloop import samples, seeded, simulated
from torch import Tensor, nn
from torch.nn import functional as F

from clients.base import Client
from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.errors import CallbackError, ClientError, ConfigError
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.run.needs import check_whole
from strategies.fedavg import FedAvg

COUNT = {"n": 0}
DRAWN = np.random.default_rng(0)
TURNS = itertools.count()
SEEN: list[int] = []
LARGE = {"n": 0}


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class Drawing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.from_numpy(DRAWN.normal(size=4)))


def by_global(o: Tensor, y: Tensor) -> Tensor:
    COUNT["n"] += 1
    return F.cross_entropy(o, y) * COUNT["n"]


def by_default(o: Tensor, y: Tensor, turns: Iterator[int] = TURNS) -> Tensor:
    return F.cross_entropy(o, y) * (1 + next(turns))


def by_closure() -> Callable[[Tensor, Tensor], Tensor]:
    n = 0

    def loss(o: Tensor, y: Tensor) -> Tensor:
        nonlocal n
        n += 1
        return F.cross_entropy(o, y) * n

    return loss


def linear() -> nn.Module:
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("model", "loss", "named"),
    [
        (lambda: Counting(4, 3), None, "attribute 'calls' of Counting"),
        (lambda: Drawing(4, 3), None, "in global 'DRAWN' of Drawing.forward"),
        (linear, by_global, "global 'COUNT' of by_global"),
        (linear, by_default, "defaults of by_default"),
        (linear, by_closure(), "closure variable 'n' of by_closure"),
    ],
)
def test_what_leaks_is_named_before_round_1(model: Any, loss: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        simulated(seeded(model), loss=loss)


def test_notes_without_effect_are_said() -> None:
    def noting(o: Tensor, y: Tensor) -> Tensor:
        SEEN.append(len(y))
        return F.cross_entropy(o, y)

    with pytest.warns(UserWarning, match=r"global 'SEEN' .* changes with each batch"):
        simulated(seeded(linear), loss=noting)


class Seldom(nn.Linear):
    """Counts batches that a trial of two samples does not have."""

    def forward(self, x: Tensor) -> Tensor:
        LARGE["n"] += len(x) > 2
        return super().forward(x) * (1 + 0.1 * LARGE["n"])


def test_what_only_larger_batches_change_is_said_after_the_first_job() -> None:
    with pytest.warns(
        UserWarning, match=r"client 0 in round 1: global 'LARGE' of Seldom.forward has changed"
    ):
        simulated(seeded(lambda: Seldom(4, 3)), "rounds=1")


class Attribute(nn.Linear):
    """Keeps its count where every client starts anew."""

    count = None

    def forward(self, x: Tensor) -> Tensor:
        self.count = (self.count or 0) + 1
        return super().forward(x) * (1 + 0.1 * self.count)


def test_attributes_of_layers_are_fine() -> None:
    assert simulated(seeded(lambda: Attribute(4, 3)), "rounds=1").weights


def test_a_metric_that_counts_is_refused() -> None:
    seen: list[int] = []

    def counting(o: Tensor, y: Tensor) -> float:
        seen.append(1)
        return float(len(seen))

    with pytest.raises(ConfigError, match=r"metrics: 'mine' gives \d+, then \d+ for the same output"):
        simulated(seeded(linear), metrics={"mine": counting}, test=samples())


class Halving(nn.Linear):
    def __init__(self, inplace: bool) -> None:
        super().__init__(4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5) if self.inplace else x * 0.5)


@pytest.mark.parametrize("method", ["fedspeed", "fedsam", "fedntd"])
def test_a_model_that_writes_to_its_inputs_sees_a_batch_twice(method: str) -> None:
    found = [
        simulated(seeded(lambda b=b: Halving(b)), f"strategy={method}", "rounds=2").rows[-1]["weights_hash"]
        for b in (False, True)
    ]
    assert found[0] == found[1]


def test_a_loss_that_writes_to_its_targets_is_refused() -> None:
    def relabelling(o: Tensor, y: Tensor) -> Tensor:
        y[y == 2] = 0
        return F.cross_entropy(o, y)

    with pytest.raises(ConfigError, match="loss: writes to the targets"):
        simulated(seeded(linear), loss=relabelling)


class Own(FedAvg):
    """FedAvg with a client of a test."""

    kind: type[Client]

    def make_client(self) -> Client:
        return self.kind(weighting=self.weighting)  # type: ignore[call-arg]


def own(kind: type) -> Own:
    return type("Own", (Own,), {"kind": kind})(server_lr=1.0, weighting="samples")  # type: ignore[no-any-return]


class Ticking(SGDClient):
    def step(self, job: Job, w: Tensor, batch: Batch, turns: list[int] = []) -> Tensor:  # noqa: B006
        turns.append(1)
        return job.descend(w, batch)


class Random(SGDClient):
    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return job.descend(w, batch) + 1e-3 * DRAWN.random()


def helper() -> float:
    helper.n += 1  # type: ignore[attr-defined]
    return helper.n  # type: ignore[attr-defined, no-any-return]


helper.n = 0  # type: ignore[attr-defined]


class Helped(SGDClient):
    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return job.descend(w, batch) + 1e-3 * helper()


class Writing(SGDClient):
    def begin(self, job: Job, w: Tensor) -> Tensor:
        x: Any = job.data.samples.x  # type: ignore[attr-defined]
        x.mul_(0.5)
        return w


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Ticking, "defaults of Ticking.step has changed"),
        (Random, "in global 'DRAWN' of Random.step, has changed"),
        (Helped, "attribute 'n' of helper"),
    ],
)
def test_what_clients_keep_elsewhere_is_said(kind: type, named: str) -> None:
    with pytest.warns(UserWarning, match=named):
        simulated(seeded(linear), strategy=own(kind))


def test_who_writes_to_the_samples_is_refused() -> None:
    with pytest.raises(ClientError, match="wrote to the samples"):
        simulated(seeded(linear), strategy=own(Writing))


def test_callbacks_do_not_change_the_model() -> None:
    class Zeroing:
        def round(self, info: Any) -> None:
            info.models["global"].w.zero_()

    with pytest.raises(CallbackError, match=r"Zeroing wrote to info.models\['global'\] in round 1"):
        simulated(seeded(linear), callbacks=[Zeroing()])


def test_the_same_on_ray_workers(tmp_path: Path) -> None:
    settings = ("engine=ray", "engine.workers=2", "strategy=fedsam", "rounds=1", f"out={tmp_path}")
    data = [samples(seed=s) for s in range(2)]
    found = [
        simulated(seeded(lambda: Halving(True)), *(s for s in over), "clients_per_round=2", data=data)
        for over in (("strategy=fedsam", "rounds=1"), settings)
    ]
    assert found[0].rows[-1]["weights_hash"] == found[1].rows[-1]["weights_hash"]


class Misspelt(SGDClient):
    def stpe(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return w

    def steps(self, w: Tensor) -> Tensor:
        return self.finished(w)

    def finished(self, w: Tensor) -> Tensor:
        return w


class AsElsewhere(SGDClient):
    def train(self, job: Job) -> Update:
        return super().fit(job)


def test_a_method_named_as_in_other_libraries_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        check_whole(own(AsElsewhere))
    assert "AsElsewhere.train() is called by nobody; is it fit()?" in caplog.text


def test_a_method_that_is_nearly_called_like_another_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        method = own(Misspelt)
        check_whole(method)
        check_whole(own(Ticking))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "is called by nobody; is it step()?" in said[0]
