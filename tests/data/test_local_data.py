"""A client's batches, evaluation over them, and the job's arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import classes, classification, network
from torch import Tensor
from torch.nn import functional as F

from fedsim import rng
from fedsim.config.schema import ClientConfig
from fedsim.data.dataset import Normalize, Samples
from fedsim.data.local import LocalData
from fedsim.local.work import local_epochs, num_steps
from fedsim.task.evaluation import evaluate, mean_of
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel

SGD = ClientConfig(lr=0.1, lr_decay=1.0, epochs=5, min_epochs=None, steps=None, batch_size=10, accumulate=1)


def local(n: int = 10, **options: Any) -> LocalData:
    """Samples 100, 101, ... of a set of 200, labels equal to the numbers."""
    x = torch.arange(200.0).view(200, 1)
    return LocalData(Samples(x, torch.arange(200)), torch.arange(100, 100 + n), torch.float64, **options)


def numbers(data: LocalData, size: int, seed: int = 0, **how: Any) -> list[list[int]]:
    how = {"epochs": 1, "steps": None, "shuffle": True, **how}
    blocks = data.blocks(size, rng=rng.torch_rng(seed, "t"), **how)
    return [b.y.tolist() for block in blocks for b in block]


def test_in_order_with_a_short_last_batch() -> None:
    assert numbers(local(7), 3, shuffle=False) == [[100, 101, 102], [103, 104, 105], [106]]
    assert numbers(local(6), 3, shuffle=False) == [[100, 101, 102], [103, 104, 105]]
    assert numbers(local(2), 3, shuffle=False, epochs=2) == [[100, 101]] * 2
    assert numbers(local(0), 3) == []


def test_steps_cut_or_prolong_the_passes() -> None:
    assert numbers(local(7), 3, shuffle=False, steps=2) == [[100, 101, 102], [103, 104, 105]]
    assert numbers(local(4), 3, shuffle=False, steps=5, epochs=1) == [
        [100, 101, 102],
        [103],
        [100, 101, 102],
        [103],
        [100, 101, 102],
    ]
    assert numbers(local(0), 3, steps=4) == []


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 20)))
def test_every_pass_is_a_permutation_and_the_count_is_announced(
    n: int, size: int, epochs: int, steps: int | None
) -> None:
    batches = numbers(local(n), size, epochs=epochs, steps=steps)
    assert len(batches) == num_steps(replace(SGD, batch_size=size, steps=steps), n, epochs)
    per_pass = -(-n // size)
    for start in range(0, len(batches), per_pass or 1):
        one = [i for b in batches[start : start + per_pass] for i in b]
        assert len(set(one)) == len(one)
        if len(batches) - start >= per_pass:
            assert sorted(one) == list(range(100, 100 + n))


def test_order_comes_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = numbers(local(), 3, epochs=2)
    torch.manual_seed(2)
    assert numbers(local(), 3, epochs=2) == first
    assert numbers(local(), 3, epochs=2, seed=1) != first
    assert first[:4] != first[4:]  # a new order each pass
    order = torch.randperm(10, generator=rng.torch_rng(0, "t"))
    assert [i for b in first[:4] for i in b] == (order + 100).tolist()


def test_large_samples_are_read_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.data import local as module

    whole = numbers(local(23), 4, epochs=2)
    monkeypatch.setattr(module, "BLOCK", 8)
    assert numbers(local(23), 4, epochs=2) == whole


def negative(x: Tensor, generator: torch.Generator) -> Tensor:
    """An augmentation that shows: negative numbers, and a draw."""
    return -x - torch.rand(1, generator=generator)


def test_augmentation_is_for_training_only() -> None:
    data = local(6, augment=negative)
    ((trained,),) = data.blocks(6, epochs=1, steps=None, shuffle=False, rng=rng.torch_rng(0, "t"))
    assert (trained.x < 0).all()
    assert trained.x.dtype == torch.float64
    assert data.everything().x.reshape(-1).tolist() == [100, 101, 102, 103, 104, 105]


def test_batches_are_fresh_tensors_in_the_runs_dtype() -> None:
    data = local(4)
    batch = data.read(torch.arange(4))
    batch.x.zero_()
    assert data.samples.x[100] == 100
    assert batch.x.dtype == torch.float64
    tokens = LocalData(Samples(torch.arange(6).view(3, 2), torch.zeros(3)), torch.arange(3), torch.float64)
    assert tokens.everything().x.dtype == torch.int64  # tokens stay integers
    assert tokens.everything().y.dtype == torch.float64
    images = LocalData(
        Samples(torch.full((2, 1, 1, 1), 255, dtype=torch.uint8), torch.zeros(2)),
        torch.arange(2),
        torch.float64,
        Normalize(1 / 255, (0.5,), (0.25,)),
    )
    assert images.everything().x.reshape(-1).tolist() == [2.0, 2.0]


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_measures_are_means_over_samples_not_over_batches() -> None:
    x, y = classes((11,))[0]
    model = FlatModel(network("bn"), torch.float64)
    model.buffers.uniform_(0.5, 1.5, generator=rng.torch_rng(0, "b"))
    data = LocalData(Samples(x, y), torch.arange(11), torch.float64)
    task = Task(model.module)
    sums = evaluate(model, model.w, data, task, torch.arange(11).split(4))
    assert [s["samples"] for s in sums] == [4, 4, 3]
    plain = network("bn").double().eval()
    plain.load_state_dict(model.state_dict(model.weights))
    with torch.no_grad():
        out = plain(x.double())
    found = mean_of(sums)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(out, y)), abs=1e-14)
    assert found["accuracy"] == pytest.approx(float((out.argmax(1) == y).double().mean()), abs=1e-15)
    assert mean_of([]) == {}


def test_evaluating_changes_neither_model_nor_mode() -> None:
    x, y = classes((5,))[0]
    model = FlatModel(network("bn"))
    before = model.weights.hash(model.layout)
    data = LocalData(Samples(x, y), torch.arange(5), torch.float32)
    evaluate(model, torch.zeros_like(model.w), data, Task(model.module), [torch.arange(5)])
    assert model.weights.hash(model.layout) == before
    assert model.module.training
    model.w.fill_(2.0)
    assert (model.module[0].weight == 2).all()  # bound to the resident vector again


def test_how_batches_are_dealt_to_workers_does_not_change_the_result() -> None:
    from fedsim.engine.base import SerialEngine

    problem = classification("bn", test=classes((103,), seed=4)[0])
    settings_ = ["evaluation.every=1", "evaluation.batch_size=7", "rounds=2"]
    expected = problem.run(*settings_)
    for workers in (2, 3, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SerialEngine, "workers", workers)
            again = problem.run(*settings_)
        assert [r["loss"] for r in again.rows] == [r["loss"] for r in expected.rows]
        assert [r["accuracy"] for r in again.rows] == [r["accuracy"] for r in expected.rows]


def test_task_without_class_labels_reports_the_loss_alone() -> None:
    task = Task(network(), loss=lambda out, y: (out - y).square().mean(), metrics=None)
    out = task.measure(torch.ones(4, 1), torch.zeros(4, 1))
    assert out == {"loss": 4.0}
    own = Task(network(), metrics={"error": lambda out, y: (out.argmax(1) != y).double().mean()})
    assert own.measure(torch.eye(2), torch.tensor([0, 0]))["error"] == 1.0


def test_clients_are_measured_on_their_held_out_samples() -> None:
    """Held-out rows are not trained on; the mean over clients is in the row, each client's value in the table."""
    problem = classification(clients=classes((20, 10, 30)), cohorts=[[0, 1]] * 2)
    settings_ = ["rounds=2", "evaluation.holdout=0.2", "evaluation.clients_every=1"]
    result = problem.run(*settings_)
    table = result.per_client
    held = table[(table.metric == "evaluate/accuracy") & (table["round"] == 2)]
    assert held.client.tolist() == [0, 1, 2]
    assert result.rows[1]["clients/accuracy"] == pytest.approx(held.value.mean())
    trained = table[(table.metric == "samples") & (table["round"] == 1)].value.tolist()
    assert trained == [2 * 16.0, 2 * 8.0]
    weights = table[(table.metric == "evaluate/weight") & (table["round"] == 2)].value.tolist()
    assert weights == [4, 2, 6]
    model = network()
    model.load_state_dict(result.weights)
    x, y = problem.clients[2]
    rows = np.sort(rng.numpy_rng(0, "holdout", 0, 2).permutation(30)[:6])
    with torch.no_grad():
        right = (model(x[rows]).argmax(1) == y[rows]).double().mean()
    assert held.value.tolist()[2] == pytest.approx(float(right))


def test_epochs_drawn_per_client_and_round_lie_in_the_range_and_differ() -> None:
    drawn = [local_epochs(replace(SGD, min_epochs=2), 0, t, c) for t in range(20) for c in range(20)]
    assert set(drawn) == {2, 3, 4, 5}
    assert drawn[:20] != drawn[20:40]
    assert local_epochs(SGD, 0, 3, 4) == 5
