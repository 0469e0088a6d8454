"""Flat vectors of any shapes: where tensors lie, that padding is there and stays zero, and that it never counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import network
from torch import nn
from torch.nn import functional as F

from fedsim import rng
from fedsim.errors import ClientError
from fedsim.rng import hash_tensors, hashing
from fedsim.task import slots
from fedsim.task.heads import Head, HeadSlots
from fedsim.task.layout import Layout
from fedsim.task.submodels import narrow
from fedsim.task.vectors import FlatModel, Weights

Shapes = list[tuple[int, ...]]
dtypes = st.sampled_from([torch.float32, torch.float64])
shapes = st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=6)


class Pile(nn.Module):
    """Parameters of the given shapes, a buffer for each, and an output that depends on all of them."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        for i, shape in enumerate(shapes):
            t = torch.arange(1.0, 1 + int(torch.Size(shape).numel())).view(shape) / 8
            self.register_parameter(f"p{i}", nn.Parameter(t.clone()))
            self.register_buffer(f"b{i}", t + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((p.square().sum() for p in self.parameters()), x.sum())


def total(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return output


def no_padding(layout: Layout, v: torch.Tensor) -> bool:
    return not bool(v[..., layout.params.gaps].any())


@given(shapes, dtypes)
def test_tensors_start_at_multiples_of_64_bytes_and_padding_fills_the_rest(
    shapes: Shapes, dtype: torch.dtype
) -> None:
    layout = Layout(Pile(shapes), dtype)
    for part in (layout.params, layout.buffers):
        assert [s.shape for s in part] == [tuple(s) for s in shapes]
        assert all(s.offset * dtype.itemsize % 64 == 0 for s in part)
        assert part.dim * dtype.itemsize % 64 == 0
        assert part.dim - part.size < len(part) * 64 // dtype.itemsize
        taken = torch.zeros(part.dim)
        for s in part:
            taken[s.span] += 1
        assert (taken[part.gaps] == 0).all() and taken.sum() == part.size == part.dim - len(part.gaps)
        assert sum(run.stop - run.start for run in part.runs) == part.size


@given(shapes, dtypes, st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_compact_undoes_expand_and_flatten_undoes_named(
    shapes: Shapes, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    layout = Layout(Pile(shapes), dtype)
    v = torch.randn(*lead, layout.size, dtype=dtype)
    w = layout.expand(v)
    assert w.shape == (*lead, layout.dim) and no_padding(layout, w)
    assert torch.equal(layout.compact(w), v)
    assert torch.equal(torch.cat([*layout.params.pieces(w), v.new_zeros(0)]), v.reshape(-1))
    if not lead:
        layout.params.add(w, 2 * v)
        assert torch.equal(w, layout.expand(v + 2 * v))
    flat = layout.expand(torch.randn(layout.size, dtype=dtype))
    assert torch.equal(layout.flatten(layout.named(flat), dtype), flat)


@given(shapes, dtypes)
def test_padding_stays_zero_whatever_the_model_does_and_never_counts(
    shapes: Shapes, dtype: torch.dtype
) -> None:
    model, dense = FlatModel(Pile(shapes), dtype), FlatModel(Pile(shapes), dtype, aligned=False)
    layout, x = model.layout, torch.ones(1, dtype=dtype)
    assert (dense.layout.dim, dense.layout.buffer_dim) == (layout.size, layout.buffer_size)
    assert model.w.data_ptr() % 64 == 0 or not layout.dim
    assert all(p.data_ptr() % 64 == 0 for p in model.module.parameters() if p.numel())
    assert model.weights.hash(layout) == hash_tensors([dense.w, dense.buffers])
    for net in (model, dense):
        net.load(net.w.clone() * 0.5, net.buffers.clone())
        g, _ = net.grad(net.w, x, x, total)
        assert torch.equal(g, net.w * 2)
        net.w.add_(g, alpha=-0.125)
        net.descend(x, x, total, 0.25, 0.5)
    assert no_padding(layout, model.w)
    assert torch.equal(layout.compact(model.w), dense.w)
    assert model.weights.hash(layout) == dense.weights.hash(dense.layout)


def test_the_hash_of_stacks_goes_model_by_model_and_ignores_padding() -> None:
    layout = Layout(network("bn"))
    rows, statistics = torch.randn(3, layout.size), torch.randn(3, layout.buffer_size)
    w, buffers = layout.expand(rows), layout.buffers.expand(statistics)
    assert Weights(w, buffers).hash(layout) == hash_tensors([rows, statistics])
    w[:, layout.params.gaps] = 7.0
    assert Weights(w, buffers).hash(layout) == hash_tensors([rows, statistics])
    w[1, 0] += 1
    assert Weights(w, buffers).hash(layout) != hash_tensors([rows, statistics])


def test_a_vector_is_told_by_its_length_and_its_zeros() -> None:
    layout = Layout(nn.Linear(3, 2))
    w = layout.expand(torch.ones(8))
    assert layout.params.holds(w) and layout.params.holds(torch.stack([w, -w]))
    assert not layout.params.holds(w[:-1]) and not layout.params.holds(torch.tensor(1.0))
    for wrong in (1.0, float("nan")):
        w[-1] = wrong
        assert not layout.params.holds(w)
    whole = Layout(nn.Linear(16, 16, bias=False))
    assert not whole.params.padded and whole.params.holds(torch.ones(256))
    assert whole.compact(v := torch.ones(256)) is v and whole.expand(v) is v


def test_gradients_of_many_models_at_once_leave_the_padding_alone() -> None:
    module = network()
    layout = FlatModel(module).layout
    w = layout.expand(torch.randn(2, layout.size))
    x, y = torch.randn(2, 6, 4), torch.arange(6).expand(2, 6) % 3

    def value(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(module, layout.named(w), (x,)), y)

    g = torch.vmap(torch.func.grad(value))(w, x, y)
    assert no_padding(layout, g) and g.abs().sum() > 0


def test_a_vector_whose_entries_do_not_lie_side_by_side_is_read_right() -> None:
    model, x, y = FlatModel(network()), torch.randn(6, 4), torch.arange(6) % 3
    apart = torch.stack([model.w, model.w * 3], dim=1)[:, 1]
    for factor in (3, 6):
        g, _ = model.grad(apart, x, y, F.cross_entropy)
        assert torch.equal(g, model.grad(model.w * factor, x, y, F.cross_entropy)[0])
        apart *= 2


def test_a_vector_of_another_length_is_refused_even_if_more_memory_follows_it() -> None:
    model, x, y = FlatModel(network()), torch.randn(6, 4), torch.arange(6) % 3
    rows = torch.zeros(3, model.layout.size)
    with pytest.raises(
        ClientError, match=r"shape \(43,\) for a model whose vectors are \(80,\); layout.expand"
    ):
        model.grad(rows[0], x, y, F.cross_entropy)


def test_heads_and_sub_models_find_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    layout = Layout(model)
    at = HeadSlots.of(layout)
    new = at.put(layout.expand(torch.randn(layout.size)), Head(torch.ones(3, 5), torch.zeros(3)))
    assert layout.named(new)["2.weight"].eq(1).all() and layout.named(new)["2.bias"].eq(0).all()
    assert no_padding(layout, new)
    sub, places = narrow(model, 0.5, torch.zeros(2, 4))
    w = FlatModel(model).w
    cut = FlatModel(sub, aligned=False)
    assert torch.equal(w[places], cut.w) and len(places) == cut.layout.size
    monkeypatch.setattr(slots, "ALIGNMENT", 1)
    assert [s.offset for s in Layout(model).params] == [0, 20, 25, 40]


def test_a_large_model_has_the_same_digest_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [torch.arange(5.0), torch.zeros(0), torch.ones(3, 2).t()]
    digests = [hash_tensors(pieces), hashing(pieces)()]
    monkeypatch.setattr(rng, "LARGE", 1)
    assert {*digests, hashing(iter(pieces))()} == {digests[0]}
