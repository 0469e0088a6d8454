"""Losses, metrics and targets handed over through ``fedsim.simulate``: measured right, or refused before round 1."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from handing import PLAIN, TEST, linear, train
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError, DataError


def test_binary_cross_entropy_takes_0_and_1() -> None:
    signs = [(x, torch.where(y > 0, 1, -1)) for x, y in PLAIN]
    for loss in (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits):
        with pytest.raises(DataError, match="the target -1 is no label of binary cross entropy"):
            train(signs, None, nn.Sequential(linear(1), nn.Flatten(0)), loss=loss)


def test_accuracy_is_measured_besides_metrics_of_ones_own() -> None:
    def second(output: Tensor, y: Tensor) -> Tensor:
        return (output.topk(2).indices == y[:, None]).any(1).float().mean()

    plain, more = train(PLAIN), train(PLAIN, metrics={"second": second})
    assert more.summary["accuracy"] == plain.summary["accuracy"]
    assert more.history["second"].iloc[-1] >= more.summary["accuracy"]
    with pytest.raises(ConfigError, match="metrics: got int; give them by name"):
        train(PLAIN, metrics=3)


class Scaled(nn.Module):
    """Cross entropy of logits by a temperature that it would learn."""

    def __init__(self) -> None:
        super().__init__()
        self.heat = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output * self.heat, y)


@pytest.mark.parametrize(
    ("loss", "setting", "words"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "rounds=1", "loss: reduction='sum' depends on"),
        (partial(F.cross_entropy, reduction="sum"), "rounds=1", "loss: reduction='sum' depends on"),
        (Scaled(), "rounds=1", "loss: Scaled has the parameter 'heat' of its own, which nobody would train"),
        (lambda o, y: float(F.cross_entropy(o, y)), "rounds=1", "loss: gave float, which has no gradient"),
        (F.cross_entropy, "task.label_smoothing=0.1", "task.label_smoothing=0.1: has no effect beside loss="),
    ],
)
def test_losses_that_are_no_mean_over_a_batch_alone(loss: Any, setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(PLAIN, TEST, None, setting, loss=loss)


def test_segmentation_needs_the_number_of_classes() -> None:
    with pytest.raises(ConfigError, match=r"task.num_classes: must be given with this task"):
        train(PLAIN, TEST, None, "task=segmentation")


def test_a_common_validation_set_would_use_samples_of_excluded_clients() -> None:
    settings = ("evaluation.validation=0.2", "exclude=[0]")
    with pytest.raises(
        ConfigError, match=r"exclude=\[0\]: evaluation.validation draws .*client_validation=0.1"
    ):
        train(PLAIN, TEST, None, *settings)


def test_a_loss_and_metrics_that_leave_out_different_classes_are_refused() -> None:
    words = r"loss: leaves out the class 255, metrics leave out task.ignore_index=-100; type task.ignore_index=255"
    with pytest.raises(ConfigError, match=words):
        settings = ("task=segmentation", "task.num_classes=3")
        train(PLAIN, TEST, None, *settings, loss=nn.CrossEntropyLoss(ignore_index=255))


def test_targets_with_names_need_a_loss() -> None:
    named = [(x, {"class": y}) for x, y in PLAIN]
    with pytest.raises(ConfigError, match=r"No loss was given, so it is cross entropy, .* give loss="):
        train(named, None)


def test_a_pixel_of_no_class_is_refused_by_client_and_row() -> None:
    x, y = torch.rand(300, 1, 2, 2), torch.zeros(300, 2, 2, dtype=torch.uint8)
    y[280, 1, 0] = 7
    model, settings = nn.Conv2d(1, 3, 1), ("task=segmentation", "task.num_classes=3")
    for clients, test, words in (
        ([(x[:9], y[:9]), (x, y)], (x[:9], y[:9]), "client 1, row 280"),
        ([(x[:9], y[:9])], (x, y), "the test set, row 280"),
    ):
        with pytest.raises(ConfigError, match=f"{words}.* has a pixel of the class 7, of task.num_classes=3"):
            train(clients, test, model, *settings, f"clients_per_round={len(clients)}")
    left = train([(x, y)], (x[:9], y[:9]), model, *settings, "task.ignore_index=7", "clients_per_round=1")
    assert left.summary["loss"] > 0


def test_a_test_set_may_be_inputs_by_name_as_clients_are() -> None:
    class Named(nn.Linear):
        def forward(self, a: Tensor) -> Tensor:
            return super().forward(a)

    def far(output: Tensor, y: None) -> Tensor:
        return (output - 1).square().mean()

    x = {"a": torch.rand(8, 2)}
    model = Named(2, 1)
    by_name, pairs = (train([t] * 6, t, model, loss=far) for t in (x, (x, None)))
    assert by_name.summary["loss"] == pairs.summary["loss"] > 0
