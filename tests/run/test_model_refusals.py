"""Models that cannot be trained are refused before round 1, in one line that names the layer; what is unused rests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plainloop import DECAY, LR, Build, samples, seeded, simulated
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedsim.config.schema import AdamConfig, ClientConfig
from fedsim.errors import ConfigError
from fedsim.local.optimiser import LocalSteps


class Lazily(nn.Module):
    """Makes its last layer in the first pass, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 6), None

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.last is None:
            self.last = nn.Linear(h.shape[1], 3).to(h)
        return self.last(h)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.phase = nn.Linear(4, 3), nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) * self.phase).abs()


class Apart(nn.Module):
    """Two parameters in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = nn.Parameter(self.a.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Teacher(nn.Module):
    """Follows its student by a running mean of frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data = 0.9 * slow.data + 0.1 * fast.data
        return self.student(x) + self.teacher(x)


class Replaced(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight = nn.Parameter(self.weight.detach().clamp(-1, 1))
        return super().forward(x)


class Growing(nn.Module):
    """A buffer that takes another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.sum()[None]])
        return self.body(x)


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.o = nn.Parameter(torch.ones(10, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.embedding(x.long().clamp(0, 9), self.table, sparse=True).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.o, self.first = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:  # its input takes no gradient, and so do its parameters none
            return self.o(self.b(checkpoint(self.a, x, use_reentrant=True)))
        return self.o(checkpoint(self.b, self.a(x), use_reentrant=True))


REFUSED: dict[str, tuple[Build, str]] = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), r"'0' \(LazyLinear\).*model\(x\)"),
    "lazy by hand": (Lazily, r"'last' is made in the first forward pass.*model\(x\)"),
    "complex": (Complex, r"'phase' is complex.*view_as_complex"),
    "one memory": (Apart, r"'b\.weight' and 'a\.weight' share memory.*register the same Parameter"),
    "frozen, yet written": (
        Teacher,
        r"frozen parameter 'teacher\.weight' was written to.*register_buffer\('weight'",
    ),
    "another parameter": (
        lambda: Replaced(4, 3),
        r"'weight' was pointed at another tensor.*self\.weight\.copy_",
    ),
    "growing buffer": (Growing, r"buffer 'seen' changes its shape"),
    "sparse gradient": (Looked, r"gradient of 'table' is sparse; type sparse=False"),
    "reentrant": (lambda: Checkpointed(first=False), r"use_reentrant=False"),
    "quantised": (
        lambda: nn.Sequential(torch.ao.nn.quantized.Linear(4, 6), nn.Linear(6, 3)),
        r"'0' is quantised \(Linear\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("factory", [False, True])
def test_refused_in_one_line_that_names_the_layer(kind: str, factory: bool, tmp_path: Path) -> None:
    build, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message) as error:
        simulated(build if factory else build(), f"dir={tmp_path}/run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_of_wider_numbers_than_the_run_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'0\.weight' is float64.*type dtype=float64, or hand over model\.float\(\)"
    ):
        simulated(nn.Sequential(nn.Linear(4, 3).double()), "dtype=float32")


def test_parameters_that_the_loss_depends_on_without_a_gradient_are_named_once() -> None:
    with pytest.warns(
        UserWarning, match=r"depends on 'a\.weight', 'a\.bias', but gives no gradient.*use_reentrant"
    ) as seen:
        simulated(seeded(Checkpointed))
    assert sum("gives no gradient" in str(w.message) for w in seen) == 1


class Routed(nn.Module):
    """One of three experts, by the sign of the input, and one that is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.sum() > 0)](x)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("strategy", ["fedavg", "fedsam"])
def test_parameters_without_part_in_the_loss_neither_decay_nor_move(momentum: float, strategy: str) -> None:
    x, y = samples()
    x = x - x.sum(1, keepdim=True) / 4 + torch.tensor([1.0] * 6 + [-1.0] * 6, dtype=torch.float64)[:, None]
    model = seeded(Routed).double()
    opt = torch.optim.SGD(model.parameters(), LR, momentum=momentum, weight_decay=DECAY)
    for rows in (
        slice(0, 6),
        slice(6, 12),
    ):  # the second expert, then the first; momentum does not move the second
        opt.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        opt.step()
    extra = [] if strategy == "fedavg" else ["strategy.rho=0.0"]
    run = simulated(
        seeded(Routed),
        f"strategy={strategy}",
        *extra,
        "rounds=1",
        "client.batch_size=6",
        f"client.momentum={momentum}",
        data=[(x, y)],
    )
    torch.testing.assert_close(dict(run.weights), dict(model.state_dict()), rtol=1e-12, atol=1e-12)


def test_adam_counts_the_steps_of_each_parameter() -> None:
    a, b = nn.Parameter(torch.tensor([1.0, 2.0]).double()), nn.Parameter(torch.tensor([3.0]).double())
    opt = torch.optim.Adam([a, b], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    adam = AdamConfig(beta1=0.9, beta2=0.99, eps=1e-8)
    local = ClientConfig(
        lr=0.1,
        lr_decay=1.0,
        momentum=0.0,
        weight_decay=0.0,
        clip_norm=None,
        clip="full",
        adam=adam,
        nesterov=False,
        decoupled=False,
        accumulate=1,
        groups=None,
        schedule=None,
        round_schedule=None,
    )
    steps, w = LocalSteps(local, 0), torch.tensor([1.0, 2.0, 3.0]).double()
    for i, g in enumerate(torch.tensor([[0.3, -0.1, 0.0], [0.2, 0.4, 0.5], [0.1, 0.1, -0.7]]).double()):
        a.grad, b.grad = g[:2].clone(), g[2:].clone() if i else None
        opt.step()
        steps.idle = () if i else (slice(2, 3),)
        w = steps(w, g.clone())
    torch.testing.assert_close(w, torch.cat([a, b]).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_are_refused_by_name(register: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    getattr(model[0].weight, register)(lambda g: g)
    with pytest.raises(ConfigError, match=rf"'0.weight' has a hook on its gradient \({register}\)"):
        simulated(model, f"dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
