"""Local optimisers against torch.optim, in float64: with groups, clipping, accumulation; several of them in one job."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from composing import compose_quickly
from problems import classification, network
from torch import Tensor, nn

from clients.base import Client
from fedsim.config.parts import as_dataclass
from fedsim.config.schema import ClientConfig
from fedsim.exchange.payload import Update
from fedsim.local import along
from fedsim.local.job import Job
from fedsim.local.optimiser import LocalSteps
from fedsim.local.pace import Pace, Sums
from fedsim.local.rates import prepared
from fedsim.task.gradients import _room
from fedsim.task.vectors import FlatModel
from strategies.fedavg import FedAvg

STEPS = 40
GROUPS = "client.groups={0.*: {lr: 0.5}, 2.*: {lr: 3, weight_decay: 0.2}, *.bias: {weight_decay: 0}}"
Make = Callable[[Any], torch.optim.Optimizer]


def local(*overrides: str) -> ClientConfig:
    return prepared(as_dataclass(compose_quickly(overrides).client, ClientConfig), 10)


def batches(count: int = STEPS, size: int = 6) -> Iterator[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield torch.randn(size, 4, generator=rng).double(), torch.randint(3, (size,), generator=rng)


def groups(model: nn.Module, lr: float, decay: float) -> list[dict[str, Any]]:
    """What ``GROUPS`` says, as torch's optimisers take it."""
    out = []
    for name, p in model.named_parameters():
        body = name.startswith("0.")
        own = 0.0 if name.endswith("bias") else decay if body else 0.2
        out.append({"params": [p], "lr": lr * (0.5 if body else 3), "weight_decay": own})
    return out


def flat(model: nn.Module) -> FlatModel:
    return FlatModel(copy.deepcopy(model), torch.float64)


def compare(model: FlatModel, theirs: nn.Module) -> None:
    torch.testing.assert_close(
        dict(model.module.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=1e-12
    )


RULES: dict[str, tuple[tuple[str, ...], Make]] = {
    "sgd": ((), lambda p: torch.optim.SGD(p, lr=0.1)),
    "decay": (("client.weight_decay=0.03",), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.03)),
    "momentum": (
        ("client.weight_decay=0.03", "client.momentum=0.8"),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.03, momentum=0.8),
    ),
    "nesterov": (
        ("client.weight_decay=0.03", "client.momentum=0.8", "client.nesterov=true"),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.03, momentum=0.8, nesterov=True),
    ),
    "adam": (
        ("client=adam", "client.lr=0.1", "client.weight_decay=0.03", "client.adam.beta1=0.7"),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.7, 0.999), weight_decay=0.03),
    ),
    "adamw": (
        ("client=adamw", "client.lr=0.1", "client.weight_decay=0.03", "client.adam.beta2=0.99"),
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.03),
    ),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_each_rule_equals_torch(name: str, grouped: bool, clip: float | None) -> None:
    settings, make = RULES[name]
    theirs = network().double()
    model, w = flat(theirs), None
    extra = ([GROUPS] if grouped else []) + ([f"client.clip_norm={clip}"] if clip else [])
    steps = LocalSteps(local(*settings, *extra), 0, model.layout)
    decay = 0.03 if name != "sgd" else 0.0
    opt = make(groups(theirs, 0.1, decay) if grouped else theirs.parameters())
    w, bounded = model.w, 0
    for x, y in batches():
        opt.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        if clip:
            bounded += bool(nn.utils.clip_grad_norm_(theirs.parameters(), clip) > clip)
        opt.step()
        w = steps(w, model.grad(w, x, y, F.cross_entropy)[0])
    compare(model, theirs)
    assert not bool(model.w[model.layout.params.gaps].any())
    assert steps.clipped == bounded and (not clip or bounded > 0)


def test_decoupled_decay_shrinks_beside_momentum() -> None:
    """SGDW: ``m <- 0.9 m + g``, ``w <- (1 - lr decay) w - lr m``; the method's own pull stays in the gradient."""
    steps = LocalSteps(local("client.momentum=0.9", "client.weight_decay=0.5", "client.decoupled=true"), 0)
    w, m, expected = (
        torch.tensor([1.0, -2.0]).double(),
        torch.zeros(2).double(),
        torch.tensor([1.0, -2.0]).double(),
    )
    for g in torch.tensor([[0.3, -0.1], [0.2, 0.4], [0.1, 0.1]]).double():
        m = 0.9 * m + g + 0.2 * expected
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * m
        w = steps(w, g.clone(), decay=0.2)
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-15)


def test_frozen_parameters_do_not_move_nor_count_for_clipping() -> None:
    theirs = network().double()
    model, before = flat(theirs), copy.deepcopy(theirs.state_dict())
    for name, p in theirs.named_parameters():
        p.requires_grad_(not name.startswith("0."))
    frozen = "client.groups={0.*: {frozen: true}}"
    steps = LocalSteps(local("client=adamw", frozen, "client.clip_norm=0.2"), 0, model.layout)
    opt = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3)
    for x, y in batches():
        opt.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.2)
        opt.step()
        steps(model.w, model.grad(model.w, x, y, F.cross_entropy)[0])
    compare(model, theirs)
    assert torch.equal(model.module.get_parameter("0.weight"), before["0.weight"])


@pytest.mark.parametrize("name", ["fedavg", "fedrep", "fedrod", "scaffold", "fedprox", "heterofl", "feddyn"])
def test_every_kind_of_step_knows_its_parameters(name: str) -> None:
    """Vectors with more behind the model's, parts of them, corrections, sub-models: factors of 1 change nothing."""
    settings = [
        f"strategy={name}",
        "dtype=float64",
        "client.momentum=0.5",
        "client.weight_decay=0.01",
        "rounds=2",
    ]
    problem = classification()
    same = "client.groups={*: {lr: 1, weight_decay: 0.01}}"
    plain, grouped = problem.run(*settings), problem.run(*settings, same)
    torch.testing.assert_close(dict(grouped.weights), dict(plain.weights), rtol=0, atol=1e-12)
    still = problem.run(*settings, "client.groups={0.weight: {frozen: true}}")
    assert torch.equal(still.weights["0.weight"], network().double().state_dict()["0.weight"])
    assert not torch.equal(still.weights["0.bias"], network().double().state_dict()["0.bias"])


# -- without a flat gradient -----------------------------------------------------------------------------------------


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 7, bias=False), nn.Linear(7, 3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "clip", [(), ("client.clip_norm=1.1",), ("client.clip_norm=1.1", "client.clip=loss")]
)
@pytest.mark.parametrize("name", ["sgd", "decay", "momentum", "nesterov", "decoupled", "schedule"])
def test_steps_along_single_gradients_have_the_bits_of_flat_ones(
    name: str, clip: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Of clipped steps, of steps that are nearly clipped and of others."""
    more = {
        "decoupled": ("client.momentum=0.7", "client.weight_decay=0.2", "client.decoupled=true"),
        "schedule": ("client.schedule=cosine", "client.momentum=0.5"),
    }
    rule = local(*(more.get(name) or RULES[name][0]), *clip)
    one, other = (FlatModel(convolutional(), dtype) for _ in range(2))
    flat_steps, steps = (LocalSteps(rule, 0, model.layout) for model in (one, other))
    assert steps.apart
    rng, whole = torch.Generator().manual_seed(5), 0
    for pace in (flat_steps.pace, steps.pace):
        if pace is not None:
            pace.begin(STEPS)
    for at in range(STEPS):
        scale = 3 * torch.rand((), generator=rng).item()
        x, y = torch.randn(6, 1, 5, 5, generator=rng).to(dtype) * scale, torch.randint(3, (6,), generator=rng)
        flat_steps(one.w, one.grad(one.w, x, y, F.cross_entropy)[0])
        grads, _ = other.gradients(x, y, F.cross_entropy)
        whole += not clip or other.backward.shorter(grads, 1.1)
        along.step(steps, other, grads)
        for pace in (flat_steps.pace, steps.pace):
            if pace is not None:
                pace.step = at + 1
        assert torch.equal(one.w, other.w), at
    assert flat_steps.clipped == steps.clipped
    assert whole == STEPS if not clip else 0 < whole < STEPS - int(steps.clipped) // 2
    if steps.momentum is not None:
        assert torch.equal(steps.momentum, flat_steps.momentum)


def test_only_what_is_shorter_however_it_is_added_up_goes_unclipped() -> None:
    """Against the norm of the flat vector in its own precision, bounds close by, and numbers that are not finite."""
    model = FlatModel(network())
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        grads = [torch.randn(p.shape, generator=rng) for p in model.views]
        norm = float(torch.linalg.vector_norm(model.backward.joined(grads)))
        for factor in (0.5, 0.99, 1 - 1e-6, 1.0, 1 + 1e-7, 1 + 1e-6):
            assert not (model.backward.shorter(grads, norm * factor) and norm + 1e-6 > norm * factor)
        assert model.backward.shorter(grads, 1.001 * norm)
    grads[0].view(-1)[0] = float("nan")
    assert not model.backward.shorter(grads, 1e9)
    grads[0].view(-1)[0] = float("inf")
    assert not model.backward.shorter(grads, 1e9)


def test_room_for_rounding_never_runs_out() -> None:
    """Half of the squared bound is always enough: an addition at most doubles what is added."""
    eps = torch.finfo(torch.float32).eps
    rooms = [_room(dim, eps) for dim in (10, 200_000, 11_000_000, 10**9)]
    assert rooms == sorted(rooms, reverse=True) and rooms[0] > 0.9999 and rooms[1] > 0.99
    assert 0.3 < rooms[3] < 0.5


# -- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("client.momentum=0.9", "client.clip_norm=0.3", "client.weight_decay=0.01"),
        ("client=adamw", "client.epochs=2", "client.lr=0.05"),
        ("client.steps=7", "client.schedule=cosine", GROUPS),
        ("strategy=scaffold",),
        ("strategy=fednova", "client.momentum=0.5"),
    ],
)
def test_accumulated_micro_batches_are_one_large_batch(settings: tuple[str, ...]) -> None:
    """Sizes 3 to 12 in steps of 6: whole steps, short last ones, and micro-batches of 2 and 1."""
    problem = classification()
    large = problem.run("dtype=float64", *settings, "client.batch_size=6", "client.accumulate=1")
    small = problem.run("dtype=float64", *settings, "client.batch_size=2", "client.accumulate=3")
    torch.testing.assert_close(dict(small.weights), dict(large.weights), rtol=0, atol=1e-12)


def test_the_mean_is_over_samples_and_what_was_idle_throughout() -> None:
    pace, sums = Pace(), Sums()
    first, second = slice(0, 1), slice(1, 2)
    pace.samples, pace.last = 3, False
    assert sums.add(torch.tensor([1.0, 0.0]), (second,), pace) is None
    pace.samples, pace.last = 1, True
    mean, idle = sums.add(torch.tensor([5.0, 0.0]), (first, second), pace) or (None, None)
    assert torch.equal(mean, torch.tensor([2.0, 0.0])) and idle == (second,)
    mean, idle = sums.add(torch.tensor([5.0, 1.0]), (), pace) or (None, None)
    assert torch.equal(mean, torch.tensor([5.0, 1.0])) and idle == ()


def test_a_micro_batch_of_one_is_left_out_under_batch_norm() -> None:
    sizes = list[int]()

    class Sizes(Client):
        def fit(self, job: Job) -> Update:
            sizes.extend(len(b.y) for b in job.batches())
            sizes.append(job.steps)
            return Update({"delta": job.delta(job.start())}, weight=1)

    strategy = FedAvg(server_lr=1.0, weighting="samples")
    strategy.client = Sizes()
    problem = classification("bn", cohorts=[[0]])  # 7 samples, one step; last: steps done
    problem.run(
        "rounds=1", "client.epochs=1", "client.batch_size=4", "client.accumulate=2", strategy=strategy
    )
    assert sizes[:3] == [4, 3, 1]  # done again, since the client changes a list of others
    sizes.clear()
    problem.run(
        "rounds=1", "client.epochs=1", "client.batch_size=3", "client.accumulate=3", strategy=strategy
    )
    assert sizes[:3] == [3, 3, 1]
