"""Flat vectors: what lies where, what is shared, and gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from problems import network
from torch import nn
from torch.nn import functional as F

from fedsim.errors import ClientError, ConfigError
from fedsim.rng import hash_tensors
from fedsim.task.layout import Layout
from fedsim.task.slots import finite
from fedsim.task.vectors import FlatModel


class Everything(nn.Module):
    """A frozen layer, tied weights, BatchNorm, a counter and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        self.scratch += 1
        return self.head(self.norm(self.frozen(self.embed(x))))


def test_layout_lists_trainable_parameters_and_saved_float_buffers_in_order() -> None:
    layout = Layout(Everything())
    assert [(s.name, s.shape, s.offset, s.numel) for s in layout.params] == [
        ("embed.weight", (4, 3), 0, 12),
        ("norm.weight", (3,), 16, 3),
        ("norm.bias", (3,), 32, 3),
    ]
    assert [(s.name, s.offset) for s in layout.buffers] == [
        ("norm.running_mean", 0),
        ("norm.running_var", 16),
    ]
    assert (layout.size, layout.dim, layout.buffer_size, layout.buffer_dim) == (18, 48, 6, 32)
    assert layout.norm == layout.batch_norm == {"norm.weight", "norm.bias"}
    assert layout.spans(["norm.bias", "norm.weight"]) == [slice(16, 35)]
    assert layout.spans(["embed.weight", "norm.bias"]) == [slice(0, 12), slice(32, 35)]


def test_named_views_carry_leading_axes() -> None:
    layout = Layout(Everything())
    w = layout.expand(torch.arange(36.0).view(2, 18))
    named = layout.named(w)
    assert named["embed.weight"].shape == (2, 4, 3)
    assert named["norm.bias"].tolist() == [[15, 16, 17], [33, 34, 35]]
    named["norm.bias"].zero_()
    assert w[:, 32:].abs().sum() == 0


def test_flatten_is_the_inverse_of_named_and_refuses_by_name() -> None:
    layout = Layout(Everything())
    w = layout.expand(torch.randn(18))
    assert torch.equal(layout.flatten(layout.named(w), torch.float32), w)
    with pytest.raises(ConfigError, match=r"parameter 'norm\.bias' is missing"):
        layout.flatten({k: v for k, v in layout.named(w).items() if k != "norm.bias"}, torch.float32)
    with pytest.raises(ConfigError, match=r"'norm\.bias' has shape \(2,\), expected \(3,\)"):
        layout.flatten({**layout.named(w), "norm.bias": torch.zeros(2)}, torch.float32)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        FlatModel(nn.Linear(2, 2).requires_grad_(False))


def test_parameters_are_views_of_the_resident_vector() -> None:
    model = FlatModel(Everything())
    model.w.fill_(0.5)
    assert (model.module.embed.weight == 0.5).all()
    assert model.module.head.weight is model.module.embed.weight
    model.buffers.fill_(2.0)
    assert (model.module.norm.running_var == 2).all()


def test_evaluating_elsewhere_leaves_the_resident_vector_alone() -> None:
    model, x, y = FlatModel(network(), torch.float64), torch.randn(5, 4).double(), torch.arange(5) % 3
    resident, elsewhere = model.w.clone(), torch.randn(model.layout.dim).double()
    copy = elsewhere.clone()
    g, _ = model.grad(elsewhere, x, y, F.cross_entropy)
    assert torch.equal(model.w, resident)
    assert torch.equal(elsewhere, copy)
    assert not torch.equal(g, model.grad(model.w, x, y, F.cross_entropy)[0])
    elsewhere.zero_()  # no longer of interest to the model
    assert torch.equal(model.module[0].weight.detach().reshape(-1), resident[:20])


def test_loading_copies_and_resets_statistics_and_counters() -> None:
    model = FlatModel(Everything())
    w, real = model.layout.expand(torch.randn(18)), model.layout.buffers.compact
    x = torch.tensor([0, 1, 2, 3])
    model.load(w, model.layout.buffers.expand(torch.arange(6.0)))
    assert real(model.buffers).tolist() == [0, 1, 2, 3, 4, 5]
    model.grad(model.w, x, x, F.cross_entropy)
    assert (int(model.module.seen), int(model.module.norm.num_batches_tracked)) == (4, 1)
    model.w.zero_()
    assert w.abs().sum() > 0
    model.load(w)
    assert real(model.buffers).tolist() == [0, 0, 0, 1, 1, 1]
    assert (int(model.module.seen), int(model.module.norm.num_batches_tracked)) == (0, 0)
    assert model.module.scratch.tolist() == [
        0,
        0,
    ]  # what is not saved must not pass to the next client either


def test_gradient_and_loss_are_those_of_autograd_in_float64() -> None:
    plain = network("bn").double()
    model = FlatModel(network("bn"), torch.float64)
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    loss = F.cross_entropy(plain(x), y)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(plain.parameters()))])
    g, value = model.grad(model.w, x, y, F.cross_entropy)
    torch.testing.assert_close(model.layout.compact(g), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(value, loss.detach(), rtol=0, atol=1e-15)
    assert g.untyped_storage().data_ptr() != model.w.untyped_storage().data_ptr()


def test_gradient_of_tied_weights_is_the_sum_over_their_uses() -> None:
    model = FlatModel(Everything(), torch.float64)
    x = torch.tensor([0, 1, 3])
    g, _ = model.grad(model.w, x, x, F.cross_entropy)
    eps, i = 1e-6, 4
    values = []
    for sign in (1, -1):
        w = model.w.clone()
        w[i] += sign * eps
        values.append(model.grad(w, x, x, F.cross_entropy)[1])
    assert float(g[i]) == pytest.approx(float(values[0] - values[1]) / (2 * eps), abs=1e-8)


def test_parameters_that_the_loss_does_not_touch_have_zero_gradient() -> None:
    model = FlatModel(network())
    g, _ = model.grad(model.w, torch.randn(2, 4), torch.zeros(2), lambda out, y: model.module[0].bias.sum())
    assert model.layout.named(g)["0.bias"].tolist() == [1.0] * 5
    assert g.abs().sum() == 5


class Functional(nn.Module):
    """Dropout as a function, which no list of modules shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(F.dropout(x, 0.5, self.training))


def test_a_loss_of_one_number_may_have_an_axis_or_another_precision_but_not_be_several() -> None:
    model, x, y = FlatModel(nn.Linear(3, 4)), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    expected, _ = model.grad(model.w, x, y, F.cross_entropy)
    for loss in (lambda o, y: F.cross_entropy(o, y).reshape(1), lambda o, y: F.cross_entropy(o, y).double()):
        g, _ = model.grad(model.w, x, y, loss)
        torch.testing.assert_close(g, expected)
    with pytest.raises(ClientError, match=r"one number, got shape \(5,\)"):
        model.grad(model.w, x, y, lambda o, y: F.cross_entropy(o, y, reduction="none"))


@pytest.mark.parametrize("module", [lambda: network("dropout"), Functional], ids=["module", "function"])
def test_a_second_look_at_a_batch_sees_the_same_dropout_masks(module: type[nn.Module]) -> None:
    model = FlatModel(module())
    model.module.train()
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    first, loss = model.grad(model.w, x, y, F.cross_entropy)
    again, same = model.grad(model.w, x, y, F.cross_entropy, again=True)
    assert torch.equal(first, again)
    assert torch.equal(loss, same)
    other, _ = model.grad(model.w, x, y, F.cross_entropy)  # the next batch draws its own
    assert not torch.equal(first, other)


def test_a_second_look_does_not_update_statistics() -> None:
    model = FlatModel(network("bn"))
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    model.grad(model.w, x, y, F.cross_entropy)
    once = model.buffers.clone()
    model.grad(model.w, x, y, F.cross_entropy, again=True)
    assert torch.equal(model.buffers, once)
    assert int(model.module[1].num_batches_tracked) == 1
    model.grad(model.w, x, y, F.cross_entropy)
    assert not torch.equal(model.buffers, once)


def test_state_dict_holds_the_given_weights_under_every_name() -> None:
    model = FlatModel(Everything())
    weights = type(model.weights)(model.layout.expand(torch.arange(18.0)), torch.full((32,), 7.0))
    state = model.state_dict(weights)
    assert set(state) == set(Everything().state_dict())
    assert state["embed.weight"].reshape(-1).tolist() == list(range(12))
    assert torch.equal(state["head.weight"], state["embed.weight"])  # tied
    assert state["norm.running_var"].tolist() == [7.0] * 3
    fresh = Everything()
    fresh.load_state_dict(state)
    assert fresh.head.weight.detach().reshape(-1).tolist() == list(range(12))


def test_hash_is_that_of_the_bytes_in_order() -> None:
    import hashlib

    t = torch.tensor([1.0, -0.0])
    assert hash_tensors([t]) == hashlib.sha256(t.numpy().tobytes()).hexdigest()
    assert hash_tensors([t]) != hash_tensors([t.abs()])  # -0.0 is not 0.0
    assert hash_tensors([t.view(2, 1).expand(2, 3)]) == hash_tensors([t.repeat_interleave(3)])


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([float("inf"), float("-inf")]), False),
        (torch.tensor([1.0, 2.0]), True),
        (torch.tensor([1, 2]), True),
        (torch.zeros(0), True),
        (torch.full((4000,), 100.0, dtype=torch.float16), True),  # their sum exceeds 65504
        (torch.tensor([1 + 2j, complex("nan")]), False),
    ],
)
def test_finite(t: torch.Tensor, expected: bool) -> None:
    assert finite(t) is expected
