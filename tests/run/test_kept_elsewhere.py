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

from fedsim.errors import CallbackError, ClientError, ConfigError

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


def test_what_only_larger_batches_change_is_refused_after_the_first_job() -> None:
    with pytest.raises(ClientError, match=r"client 0 in round 1: .* global 'LARGE' of Seldom.forward has ch"):
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
