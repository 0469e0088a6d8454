"""What layers keep between batches reaches neither the next client nor, from an evaluation, the training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from keeping import KINDS, Cache, Keeps
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.data.dataset import Samples
from fedsim.data.local import LocalData
from fedsim.errors import ClientError
from fedsim.task.attributes import Attributes
from fedsim.task.evaluation import evaluate, features, sample_losses
from fedsim.task.rehearsal import rehearsed
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel


def data(n: int = 24) -> LocalData:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)
    return LocalData(Samples(x, y), torch.arange(n), torch.float64)


def flat(kind: type[Keeps]) -> FlatModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind().double()
    habits = rehearsed(Task(module), data().read(torch.arange(2)), torch.float64)
    return FlatModel(module, torch.float64, habits=habits)


def job(model: FlatModel, start: Tensor, first: int, measured: bool = False) -> Tensor:
    """Weights and buffers after three steps, from row ``first`` on."""
    w = model.load(start)
    for i in range(3):
        batch = data().read(torch.arange(first + 4 * i, first + 4 * i + 4))
        model.descend(*batch, F.cross_entropy, 0.1, 0.0)
        if measured:
            evaluate(model, start, data(), Task(model.module), [torch.arange(5)])
            evaluate(model, w, data(), Task(model.module), [torch.arange(5)])
    model.check()
    return torch.cat([w, model.buffers]).clone()


@pytest.mark.parametrize("kind", KINDS)
def test_each_client_starts_without_what_others_left_and_measuring_leaves_nothing(kind: type[Keeps]) -> None:
    model = flat(kind)
    start = model.w.clone()
    alone = job(model, start, 0)
    job(model, start, 12)
    assert torch.equal(job(model, start, 0), alone)
    assert torch.equal(job(model, start, 0, measured=True), alone)
    assert torch.equal(job(flat(kind), start, 0), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_each_batch_is_measured_as_if_it_were_the_only_one(kind: type[Keeps]) -> None:
    model, samples = flat(kind), data()
    task, rows, start = Task(model.module), [torch.arange(4), torch.arange(4, 12)], model.w.clone()
    together = evaluate(model, model.load(start), samples, task, rows)
    job(model, start, 0)
    apart = [evaluate(model, model.load(start), samples, task, [r])[0] for r in rows[::-1]][::-1]
    assert together == apart
    batches = [samples.read(r) for r in rows]
    assert torch.equal(features(model, model.w, batches)[1], features(model, model.w, batches[1:])[0])
    every = sample_losses(model, model.w, samples, task, batch_size=8)
    assert float(every[:8].sum()) == pytest.approx(
        sample_losses(model, model.w, samples, task, 8)[:8].sum().item(), abs=0
    )


def test_what_a_mask_cached_in_evaluation_is_good_for_in_training() -> None:
    """Such tensors may take part in a graph: evaluation is without gradients, not in inference mode."""

    class Masked(Cache):
        def remember(self, x: Tensor) -> Any:
            self.mask = self.__dict__.get("mask", torch.ones(3))
            assert not self.mask.is_inference()
            return self.body(x) * self.mask

    model = flat(Masked)
    with model.measuring(model.w):
        kept = model.module(data().read(torch.arange(2)).x)
    assert not kept.is_inference()


@pytest.mark.parametrize("change", ["points", "parameter", "buffer", "frozen", "freezes"])
def test_what_no_trial_showed_is_refused_by_name_at_the_end_of_the_job(change: str) -> None:
    model = FlatModel(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False))
    )
    layers, start = model.module, model.w.clone()
    model.load(start)
    if change == "points":
        layers[0].weight.data = layers[0].weight.data * 2
    elif change == "parameter":
        layers[0].weight = nn.Parameter(layers[0].weight.detach())
    elif change == "freezes":
        layers[0].weight.requires_grad_(False)
    elif change == "buffer":
        layers[1].running_mean = torch.ones(3)
    else:
        with torch.no_grad():
            layers[2].weight.add_(1)
    name = {"buffer": r"buffer '1\.running_mean'", "frozen": r"frozen parameter '2\.weight'"}.get(
        change, r"'0\.weight'"
    )
    said = "requires_grad_" if change == "freezes" else r"self\.\w+"
    with pytest.raises(ClientError, match=rf"{name}.*{said}"):
        model.check()
    model.repair()
    model.load(start)
    model.check()
    assert layers[0].weight.data_ptr() == model.w.data_ptr()


def test_attributes_that_hold_each_other_are_put_back_too() -> None:
    layer = nn.Linear(1, 1)
    layer.a, layer.s = [1], {1}
    layer.a.append(layer.a)
    found = Attributes([layer], [layer, *layer.parameters()])
    layer.a[0], layer.new = 2, 3
    layer.s.clear()
    found.restore()
    assert layer.a[0] == 1 and layer.a[1] is layer.a and layer.s == {1} and not hasattr(layer, "new")
    assert found.unchanged() and found.comparable


def test_masks_of_one_client_are_not_those_of_the_next() -> None:
    """``again=True`` looks at a batch a second time; where there was no first, draws go on."""
    layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    model, (x, y) = FlatModel(layers, torch.float64), data().read(torch.arange(6))

    def client() -> Tensor:
        torch.manual_seed(5)
        model.forget()
        return model.grad(model.w, x, y, F.cross_entropy, again=True)[0]

    first = client()
    torch.manual_seed(9)
    model.grad(model.w, x, y, F.cross_entropy)
    assert torch.equal(client(), first)


class Centres:
    """A loss that remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        self.seen.append(float(output.mean()))
        return F.cross_entropy(output, y) * (1 + sum(self.seen))


class CentresAsModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        self.centre.mul_(0.5).add_(output.detach().mean(0))
        return F.cross_entropy(output - self.centre.clone(), y)


@pytest.mark.parametrize("kind", [Centres, CentresAsModule])
def test_what_a_loss_remembers_reaches_nobody_either(kind: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, loss = nn.Sequential(nn.Linear(4, 3)).double(), kind()
    rehearsed(Task(module, loss), data().read(torch.arange(2)), torch.float64)
    model = FlatModel(module, torch.float64, loss=loss)
    start, rows = model.w.clone(), torch.arange(4)

    def client(first: int) -> Tensor:
        w = model.load(start)
        for i in range(2):
            model.descend(*data().read(rows + first + 4 * i), loss, 0.1, 0.0)
            evaluate(model, w, data(), Task(module, loss), [rows, rows])
        return w.clone()

    alone = client(0)
    client(12)
    assert torch.equal(client(0), alone)
    w, fresh = start.clone().requires_grad_(), kind()
    for i in range(2):
        x, y = data().read(rows + 4 * i)
        out = F.linear(x, w[:12].view(3, 4), w[16:19])
        (g,) = torch.autograd.grad(fresh(out, y), w)
        w = (w - 0.1 * g).detach().requires_grad_()
    torch.testing.assert_close(alone, w.detach(), rtol=1e-12, atol=1e-14)
