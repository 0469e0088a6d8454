"""What a batch's loss is the mean of, where that is not its samples: targets that are left, tokens, pixels."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_metrics import LOGITS, Y, cut
from torch import nn

from fedsim.errors import ConfigError
from fedsim.task.evaluation import mean_of
from fedsim.task.losses import cross_entropy, logits_cross_entropy, own_loss, weighed
from fedsim.task.metrics import admitted_metrics
from fedsim.task.problems import (
    classification,
    language_model,
    multilabel,
    regression,
    segmentation,
    token_cross_entropy,
    tokens_of,
)
from fedsim.task.task import Task


@pytest.mark.parametrize("size", [1, 7, 200])
def test_a_loss_that_leaves_targets_out_is_that_of_the_whole_set(size: int) -> None:
    """As many targets as are left weigh, not as many samples; a batch without any has no say."""
    y = torch.where(torch.arange(200) % 7 < 3, -100, Y)
    sizes = [size] * (200 // size) + [200 % size] * (200 % size > 0)
    plain = nn.functional.cross_entropy
    smoothed = partial(plain, label_smoothing=0.2)
    for loss in (cross_entropy, logits_cross_entropy, plain, nn.CrossEntropyLoss(), smoothed):
        task = Task(nn.Identity(), loss, {}, weighed=weighed(loss))
        assert cut(task, LOGITS, y, sizes)["loss"] == pytest.approx(float(loss(LOGITS, y)), abs=1e-12)
    zero = nn.CrossEntropyLoss(ignore_index=0)
    task = Task(nn.Identity(), zero, {}, weighed=weighed(zero))
    assert cut(task, LOGITS, Y, sizes)["loss"] == pytest.approx(float(zero(LOGITS, Y)), abs=1e-12)


@pytest.mark.parametrize("shift", [True, False])
def test_the_loss_that_a_model_works_out_by_itself_is_over_its_tokens(shift: bool) -> None:
    z, y = LOGITS.view(20, 10, 4), torch.where(torch.arange(200) % 7 < 3, -100, Y).view(20, 10)

    def output(rows: Any) -> Any:
        return SimpleNamespace(logits=z[rows], loss=token_cross_entropy(z[rows], y[rows], shift=shift))

    units = tokens_of(output(slice(0, 2)), y[:2])
    task = Task(nn.Identity(), own_loss, {}, weighed=units)
    for size in (1, 7, 20):
        rows = [slice(i, i + size) for i in range(0, 20, size)]
        parts = [{"samples": float(len(y[r])), **task.measure(output(r), y[r])} for r in rows]
        whole = float(output(slice(0, 20)).loss)
        assert mean_of(parts, task=task)["loss"] == pytest.approx(whole, abs=1e-12)
    assert tokens_of(SimpleNamespace(logits=z[:2], loss=torch.tensor(0.1)), y[:2]) is None
    longer = SimpleNamespace(logits=torch.cat([z[:2, :3], z[:2]], 1))  # as virtual tokens before a text are
    assert token_cross_entropy(longer, y[:2], shift=shift) == token_cross_entropy(z[:2], y[:2], shift=shift)


def test_maps_and_tokens_of_narrow_integers_are_those_of_wide_ones() -> None:
    z, y = LOGITS.view(2, 10, 10, 4).permute(0, 3, 1, 2), Y.view(2, 10, 10).clone()
    y[:, 0], y[0, 1] = 255, 3
    kind = segmentation(num_classes=4, ignore_index=255)
    task = Task(nn.Identity(), kind.loss, admitted_metrics(kind.metrics or {}), count=kind.count)
    expected = cut(task, z, y, [2])
    for narrow in (torch.uint8, torch.int32, torch.int16):
        assert cut(task, z, y.to(narrow), [1, 1]) == pytest.approx(expected)
    some = segmentation(num_classes=200)  # whose -100 is 156 in bytes
    bytes_of = torch.full((1, 2, 2), 156, dtype=torch.uint8)
    logits = torch.zeros(1, 200, 2, 2)
    task = Task(nn.Identity(), some.loss, admitted_metrics(some.metrics or {}), count=some.count)
    assert cut(task, logits, bytes_of, [1]) == cut(task, logits, bytes_of.long(), [1])
    with pytest.raises(ConfigError, match=r"the class 3, of task.num_classes=3; type task.ignore_index=3"):
        segmentation(num_classes=3, ignore_index=255).loss(z[:, :3], y)
    with pytest.raises(ConfigError, match=r"task.num_classes=5: but the model gives 4 logits"):
        segmentation(num_classes=5).loss(z, y)


def test_a_batch_without_a_pixel_that_counts_has_no_loss_and_no_gradient() -> None:
    loss, z = segmentation(num_classes=3, ignore_index=255).loss, torch.randn(2, 3, 4, 4, requires_grad=True)
    y = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    assert callable(loss)
    nothing = loss(z, y)
    nothing.backward()
    assert nothing.item() == 0 and not z.grad.any()
    y[0, 0] = 2
    assert torch.equal(loss(z, y), nn.functional.cross_entropy(z, y.long(), ignore_index=255))


@pytest.mark.parametrize(
    ("problem", "output", "y"),
    [
        (segmentation(num_classes=4), (2, 4), torch.zeros(2)),
        (segmentation(num_classes=4), (2, 4, 3, 3), torch.zeros(2, 1, 3, 3)),
        (language_model(), (2, 4), torch.zeros(2)),
        (multilabel(), (2, 4), {"a": torch.zeros(2, 4)}),
        (regression(), (2, 4), {"a": torch.zeros(2, 4)}),
    ],
)
def test_targets_of_another_kind_of_problem_are_refused_by_what_the_task_takes(problem, output, y) -> None:
    with pytest.raises(ConfigError, match=r"task=\w+: takes .*, not .* of outputs \(2, 4"):
        problem.loss(torch.zeros(output), y)


def test_losses_of_half_precision_logits_are_computed_in_float32() -> None:
    """A sum of bfloat16 numbers has three digits: differences of losses, and perplexities, would drown in it."""
    z, y = LOGITS.view(20, 10, 4).bfloat16(), Y.view(20, 10)
    output = SimpleNamespace(logits=z)
    found = token_cross_entropy(output, y)
    assert found.dtype == torch.float32
    exact = nn.functional.cross_entropy(z[:, :-1].double().flatten(0, 1), y[:, 1:].flatten())
    assert float(found) == pytest.approx(float(exact), rel=1e-6)
    for loss in (cross_entropy, logits_cross_entropy):
        task = Task(nn.Identity(), loss)
        wide = nn.functional.cross_entropy(z.view(200, 4).double(), Y)
        assert task.measure(z.view(200, 4), Y)["loss"] / 200 == pytest.approx(float(wide), rel=1e-6)
    smoothed = classification(label_smoothing=0.2).loss
    assert smoothed is not None
    plain = nn.functional.cross_entropy(LOGITS, Y, label_smoothing=0.2)
    assert smoothed(SimpleNamespace(logits=LOGITS), Y) == smoothed(LOGITS, Y) == plain
