"""The resident model of a GPU computes what that of a CPU does; here on a CPU, where nothing is captured."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsim.data.lazy import Parts
from fedsim.task.captured import CapturedModel, exact
from fedsim.task.losses import cross_entropy, stateless
from fedsim.task.vectors import FlatModel


@pytest.mark.parametrize("capturing", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_and_gradients_are_those_of_a_flat_model(capturing: bool, decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    plain = FlatModel(copy.deepcopy(model), torch.float64)
    other = CapturedModel(copy.deepcopy(model), torch.float64)
    if capturing:
        other.capture(F.cross_entropy)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    for lr in (0.1, 0.1, 0.05):
        losses = [m.descend(x, y, F.cross_entropy, lr, decay) for m in (plain, other)]
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(other.w, plain.w, rtol=0, atol=1e-14)
        torch.testing.assert_close(other.buffers, plain.buffers, rtol=0, atol=1e-14)
    for again in (False, True):
        before = other.buffers.clone()
        g, h = (m.grad(m.w, x, y, F.cross_entropy, again=again)[0] for m in (plain, other))
        torch.testing.assert_close(h, g, rtol=0, atol=1e-13)
        assert torch.equal(before, other.buffers) is again


def test_parameters_without_part_in_the_loss_do_not_decay() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(2))})
    flat = CapturedModel(model)
    flat.descend(torch.zeros(1), torch.zeros(1), lambda m, _: m["a"].sum(), 0.5, 0.1, lambda m, _: m)
    assert torch.equal(model["b"].data, torch.ones(2))
    torch.testing.assert_close(model["a"].data, torch.full((3,), 0.95 - 0.5))


def test_torchs_switches_are_put_back_even_after_an_error() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)
    with pytest.raises(ValueError, match="within"), exact(False):
        assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)
        raise ValueError("within")
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32) == before


def test_data_of_several_owners_lie_on_a_device_as_one_tensor() -> None:
    parts = Parts([torch.arange(6.0).view(3, 2), torch.arange(4.0).view(2, 2)])
    whole = parts.to("cpu")
    assert isinstance(whole, torch.Tensor)
    rows = torch.tensor([4, 0, 3])
    assert torch.equal(whole[rows], parts.take(rows))


def test_a_loss_that_may_keep_something_is_told_from_one_that_cannot() -> None:
    class Counting:
        def __call__(self, output: Any, y: Any) -> Any:
            return output.sum()

    def enclosed(output: Any, y: Any) -> Any:
        return output.sum() * weight

    weight = 2.0
    for loss in (F.cross_entropy, nn.MSELoss(), cross_entropy, partial(F.cross_entropy, label_smoothing=0.1)):
        assert stateless(loss)
    for loss in (Counting(), enclosed, partial(Counting())):
        assert not stateless(loss)
