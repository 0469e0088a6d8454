"""Losses and metrics in which each output meets the targets of all samples are refused before round 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plainloop import seeded, simulated
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError


def squared(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def numbers() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(x, x.sum(1)) for x in torch.randn(2, 8, 4, generator=g)]


@pytest.mark.parametrize(
    "loss", [squared, F.mse_loss, F.l1_loss, lambda o, y: F.smooth_l1_loss(o, y) + 0 * o.sum()]
)
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_outputs_that_meet_all_targets(loss: Any, column: bool, scale: float) -> None:
    clients = [(x, y[:, None] if column else y) for x, y in numbers()]
    single = nn.Linear(4, 1)
    with torch.no_grad():  # of scale 0 all outputs are alike
        single.weight.copy_(scale * torch.tensor([[0.3, -0.1, 0.2, 0.4]]))
    flat = nn.Sequential(single, nn.Flatten(0))
    with pytest.raises(ConfigError, match=f"loss: .*{'y' if column else 'output'}.squeeze"):
        simulated(seeded(lambda: flat if column else single), data=clients, loss=loss)
    assert simulated(seeded(lambda: single if column else flat), "rounds=1", data=clients, loss=loss)


def test_metrics_too_and_functions_that_give_both_one_shape_may_stay() -> None:
    def fits(o: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(o.squeeze(), y)

    run: dict[str, Any] = {"data": numbers(), "test": numbers()[0], "loss": fits}
    model = seeded(lambda: nn.Linear(4, 1))
    with pytest.raises(ConfigError, match=r"metrics: 'mse': .*output\.squeeze"):
        simulated(model, metrics={"mse": squared}, **run)
    assert simulated(model, "rounds=1", metrics={"mse": fits}, **run)
