"""Metrics of a whole set from parts of it: exactly, whatever the batches and whoever computed them."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics as tm
from problems import classification
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.task.evaluation import mean_of
from fedsim.task.losses import weighed
from fedsim.task.merging import check_merging
from fedsim.task.metrics import Counted, admitted_metrics
from fedsim.task.problems import language_model, multilabel, segmentation
from fedsim.task.task import Task

G = torch.Generator().manual_seed(0)
LOGITS, Y = torch.randn(200, 4, generator=G, dtype=torch.float64), torch.randint(0, 4, (200,), generator=G)


def cut(task: Task, output: Tensor, y: Tensor, sizes: list[int], pickled: bool = False) -> dict[str, Any]:
    """The means over ``output``, measured in parts of ``sizes``."""
    parts = []
    for o, t in zip(output.split(sizes), y.split(sizes), strict=True):
        part = {"samples": float(len(t)), **task.measure(o, t)}
        parts.append(pickle.loads(pickle.dumps(part)) if pickled else part)
    return mean_of(parts, task=task)


ACCURACY = tm.Accuracy("multiclass", num_classes=4)
METRICS = {
    "accuracy": tm.Accuracy("multiclass", num_classes=4, average="macro"),
    "f1": tm.F1Score("multiclass", num_classes=4, average="macro"),
    "auroc": tm.AUROC("multiclass", num_classes=4),
    "binned": tm.AUROC("multiclass", num_classes=4, thresholds=20),
    "calibration": tm.CalibrationError("multiclass", num_classes=4),
    "confusion": tm.ConfusionMatrix("multiclass", num_classes=4),
    "several": tm.MetricCollection({"recall": tm.Recall("multiclass", num_classes=4)}),
}


@pytest.mark.parametrize("sizes", [[200], [1, 99, 100], [13] * 15 + [5]])
def test_torchmetrics_objects_are_exact_over_parts(sizes: list[int]) -> None:
    task = Task(nn.Identity(), metrics=admitted_metrics(METRICS))
    found = cut(task, LOGITS, Y, sizes, pickled=True)
    confusion = [f"confusion/{i}/{j}" for i in range(4) for j in range(4)]
    assert list(found) == ["loss", "accuracy", "f1", "auroc", "binned", "calibration", *confusion, "recall"]
    for name, metric in METRICS.items():
        if name == "several":
            continue
        whole = metric.clone().set_dtype(torch.float64)(LOGITS, Y)
        columns = [v for k, v in found.items() if k.partition("/")[0] == name]
        assert columns == pytest.approx(whole.flatten().tolist(), abs=1e-12)


def test_the_users_object_stays_as_it_is() -> None:
    metric = tm.Accuracy("multiclass", num_classes=4)
    cut(Task(nn.Identity(), metrics=admitted_metrics({"a": metric})), LOGITS, Y, [200])
    assert metric._update_count == 0


def test_sums_and_counts_are_added_before_they_are_divided() -> None:
    def over_right(output: Tensor, y: Tensor) -> tuple[float, int]:
        right = output.argmax(1) == y
        return float(output.max(1).values[right].sum()), int(right.sum())

    task = Task(
        nn.Identity(), metrics=admitted_metrics({"score": over_right, "first": lambda o, y: o[:, 0].mean()})
    )
    right = LOGITS.argmax(1) == Y
    found = cut(task, LOGITS, Y, [7, 93, 100])
    assert found["score"] == pytest.approx(float(LOGITS.max(1).values[right].mean()), abs=1e-12)
    assert found["first"] == pytest.approx(float(LOGITS[:, 0].mean()), abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_perplexity_is_over_tokens(size: int) -> None:
    """Six texts of 5 to 60 tokens: exp(total / count), however they are batched; means of means would differ."""
    lengths = [5, 60, 11, 23, 42, 9]
    y = torch.full((6, 60), -100)
    for row, n in zip(y, lengths, strict=True):
        row[:n] = torch.randint(0, 30, (n,), generator=G)
    logits = torch.randn(6, 60, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = sum(
        -float(logits[i, t].log_softmax(-1)[y[i, t + 1]]) for i, n in enumerate(lengths) for t in range(n - 1)
    )
    kind = language_model()
    task = Task(
        nn.Identity(), kind.loss, admitted_metrics(kind.metrics or {}), count=kind.count, derived=kind.derived
    )
    found = cut(task, logits, y, [size] * (6 // size))
    count = sum(lengths) - 6
    assert found["loss"] == pytest.approx(total / count, abs=1e-9)
    assert found["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), abs=1e-4)


def test_a_batch_without_targets_has_no_say() -> None:
    kind = language_model()
    task = Task(nn.Identity(), kind.loss, {}, count=kind.count)
    logits, y = torch.randn(2, 5, 3, generator=G), torch.tensor([[0, 1, 2, 1, 0], [-100] * 5])
    one, both = cut(task, logits[:1], y[:1], [1]), cut(task, logits, y, [1, 1])
    assert one == both and one["loss"] == one["loss"]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_iou_and_f1_are_of_the_whole_set(size: int) -> None:
    logits = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    y = torch.randint(0, 3, (8, 4, 4), generator=torch.Generator().manual_seed(3))
    y[0, 0] = -100
    kind = segmentation(num_classes=3)
    task = Task(nn.Identity(), kind.loss, admitted_metrics(kind.metrics or {}), count=kind.count)
    found, kept = cut(task, logits, y, [size] * (8 // size) + [8 % size] * (8 % size > 0)), y != -100
    guess, y = logits.argmax(1)[kept], y[kept]
    each = [float(((guess == c) & (y == c)).sum() / ((guess == c) | (y == c)).sum()) for c in range(3)]
    assert found["iou"] == pytest.approx(sum(each) / 3, abs=1e-6)
    assert found["accuracy"] == pytest.approx(float((guess == y).double().mean()), abs=1e-12)

    z, t = torch.randn(8, 5, generator=G), torch.randint(0, 2, (8, 5), generator=G)
    kind = multilabel(threshold=0.7)
    task = Task(nn.Identity(), kind.loss, admitted_metrics(kind.metrics or {}))
    found = cut(task, z, t, [size] * (8 // size) + [8 % size] * (8 % size > 0))
    whole = tm.F1Score("multilabel", num_labels=5, threshold=0.7)(z.sigmoid(), t)
    assert found["f1"] == pytest.approx(float(whole), abs=1e-6)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"p": tm.PearsonCorrCoef()}, "'p' .PearsonCorrCoef. keeps .* cannot be put together exactly"),
        ({"x": 3}, "'x' is a int; give a function"),
        ({"loss": lambda o, y: o.mean()}, "'loss' is always measured"),
        ([1], "got list; give them by name"),
        (
            {"m": tm.MinMaxMetric(ACCURACY)},
            "'m' .MinMaxMetric. keeps other metrics .MulticlassAccuracy.*by themselves",
        ),
        ({"b": tm.BootStrapper(ACCURACY)}, "'b' .BootStrapper. keeps other metrics"),
        ({"s": ACCURACY + ACCURACY}, "'s' .CompositionalMetric. keeps other metrics"),
        ({"weights_hash": ACCURACY}, "'weights_hash' is always measured"),
        ({"c": tm.MetricCollection({"loss": ACCURACY})}, "'loss' is always measured"),
        (
            {"c": tm.MetricCollection({"a": ACCURACY}), "a": ACCURACY},
            "'a' is the name of two",
        ),
        ({3: ACCURACY}, "the name 3 is no text"),
    ],
)
def test_what_does_not_add_up_is_refused(metrics: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        admitted_metrics(metrics)


def test_a_metric_must_give_numbers() -> None:
    task = Task(nn.Identity(), metrics={"odd": lambda o, y: "much"})
    with pytest.raises(ConfigError, match="'odd' gave str; expected one number"):
        task.measure(LOGITS, Y)


class Uncounted(tm.Metric):
    """Right guesses by a number of samples that is no state."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0.0), dist_reduce_fx="sum")
        self.seen = 0

    def update(self, output: Tensor, y: Tensor) -> None:
        self.right += (output.argmax(1) == y).sum()
        self.seen += len(y)

    def compute(self) -> Tensor:
        return self.right / self.seen


class Largest(Uncounted):
    """The same, in a list of which only the last entry counts."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("last", [], dist_reduce_fx="cat")

    def update(self, output: Tensor, y: Tensor) -> None:
        self.last.append(output.sum())

    def compute(self) -> Tensor:
        return self.last[-1]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (Uncounted(), r"keeps 'seen' outside of its states.*add_state"),
        (Largest(), "put together from two parts"),
    ],
)
def test_a_metric_of_two_parts_must_be_that_of_the_whole(metric: tm.Metric, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_merging("odd", Counted("odd", metric), LOGITS, Y)


def test_torchmetrics_objects_that_can_be_put_together_pass() -> None:
    for name, metric in admitted_metrics(METRICS).items():
        check_merging(name, metric, LOGITS[:2], Y[:2])


@pytest.mark.parametrize("size", [1, 7, 200])
def test_a_loss_weighted_by_class_is_that_of_the_whole_set(size: int) -> None:
    weight = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=torch.float64)
    for loss in (
        nn.CrossEntropyLoss(weight, ignore_index=3),
        partial(nn.functional.cross_entropy, weight=weight, label_smoothing=0.1),
    ):
        task = Task(nn.Identity(), loss, {}, weighed=weighed(loss))
        sizes = [size] * (200 // size) + [200 % size] * (200 % size > 0)
        assert cut(task, LOGITS, Y, sizes)["loss"] == pytest.approx(float(loss(LOGITS, Y)), abs=1e-12)


def test_several_numbers_of_one_metric_are_columns_also_of_clients() -> None:
    metrics = {"recall": tm.Recall("multiclass", num_classes=3, average=None)}
    settings = ("rounds=1", "evaluation.holdout=0.3", "evaluation.clients_every=1")
    (row,) = classification().run(*settings, metrics=metrics).rows
    for place in ("", "clients/"):
        found = [row[f"{place}recall/{k}"] for k in range(3)]
        assert all(type(v) is float for v in found) and f"{place}recall" not in row
    counted = Counted("own", tm.MeanSquaredError())
    assert counted.named({"a": torch.tensor(1), "b": [2.0, torch.tensor([3.0])]}) == {
        "a": 1,
        "b/0": 2,
        "b/1": 3,
    }


def test_curves_whose_size_hangs_on_the_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'roc' \(MulticlassROC\) gives curves, .* fixed size"):
        classification().run("rounds=1", metrics={"roc": tm.ROC("multiclass", num_classes=3)})
