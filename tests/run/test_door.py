"""What people hand over, through ``fedsim.simulate``: trained to the right numbers, or refused before round 1."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import compose_quickly
from handing import PLAIN, TEST, linear, train
from problems import QUIET, classification, hashes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedsim
from fedsim.api import run
from fedsim.data.dataset import Dataset, Normalize, Samples
from fedsim.errors import ConfigError, DataError, FedsimError
from fedsim.run import samples


def each(x: Any = lambda t: t, y: Any = lambda t: t) -> list[Any]:
    """The plain clients with their inputs and labels turned into something else."""
    return [(x(a), y(b)) for a, b in PLAIN]


@pytest.mark.parametrize(
    "clients",
    [
        each(y=Tensor.int),
        each(y=lambda y: y.to(torch.uint8)),
        each(y=Tensor.float),
        each(y=lambda y: y[:, None]),
        each(y=Tensor.tolist),
        each(x=Tensor.numpy, y=lambda y: y.numpy().astype(">i2")),
        [TensorDataset(*pair) for pair in PLAIN],
        [DataLoader(TensorDataset(*pair), batch_size=2, shuffle=True) for pair in PLAIN],
        {f"site {i}": pair for i, pair in enumerate(PLAIN)},
    ],
)
def test_labels_and_containers_of_every_kind_train_to_the_same_weights(clients: Any) -> None:
    assert hashes(train(clients)) == hashes(train(PLAIN))


def test_labels_by_name_from_1_and_signs_train_as_ids_from_0() -> None:
    plain, (x, y) = hashes(train(PLAIN)), TEST
    names = np.array(["ant", "bee", "cat"])
    assert hashes(train(each(y=lambda y: names[y]), (x, names[y]))) == plain
    moved = train(each(y=lambda y: y + 1), (x, y + 1))
    assert hashes(moved) == plain and moved.rows[-1]["accuracy"] == train(PLAIN).rows[-1]["accuracy"]
    two = [(a, (b > 0).long()) for a, b in PLAIN]
    signs = [(a, 2 * b - 1) for a, b in two]
    test = (x, (y > 0).long())
    assert hashes(train(signs, (x, 2 * test[1] - 1))) == hashes(train(two, test))


def test_an_empty_client_changes_nobodys_labels() -> None:
    empty = [*PLAIN[:2], (np.empty((0, 4), np.float32), np.array([])), *PLAIN[3:]]
    same = [*PLAIN[:2], (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), *PLAIN[3:]]
    assert hashes(train(empty)) == hashes(train(same))


def test_integers_and_bool_are_numbers_for_a_model_of_numbers() -> None:
    whole = each(x=lambda x: (10 * x).round())
    ints = [(x.long(), y) for x, y in whole]
    assert hashes(train(ints, (TEST[0].round().long(), TEST[1]))) == hashes(
        train(whole, (TEST[0].round(), TEST[1]))
    )
    flags = [(x > 0, y) for x, y in PLAIN]
    floats = [((x > 0).float(), y) for x, y in PLAIN]
    assert hashes(train(flags, None)) == hashes(train(floats, None))


def test_integers_are_looked_up_by_a_model_that_does() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 3))

    tokens = each(x=lambda x: x.abs().clamp(max=8).long())
    assert hashes(train(tokens, None, model)) == hashes(
        train([(x.short(), y) for x, y in tokens], None, model)
    )


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        ([*PLAIN[:5], (PLAIN[5][0], PLAIN[5][1] * 0 - 100)], r"client 5, row 0: label -100"),
        (each(y=lambda y: y + 0.5), r"client 0, row 0: target .*is a number.*mse_loss"),
        (
            [*PLAIN[:2], (PLAIN[2][0] * float("inf"), PLAIN[2][1]), *PLAIN[3:]],
            r"client 2, row 0 \(row 19 of",
        ),
        (
            [*PLAIN[:4], (PLAIN[4][0], PLAIN[4][1] * 0 + 3), PLAIN[5]],
            r"3 outputs, but client 4, row 0.* label 3; give",
        ),
        (each(x=lambda x: x[:, :3]), r"the test set: samples of shape \(4,\), client 0 has \(3,\)"),
        (
            each(x=lambda x: {"a": x}),
            r"the test set: its x is made of one array, that of client 0 of \['a'\]",
        ),
        (each(y=lambda y: F.one_hot(y, 3)), r"\(2, 3\) for two samples.*one-hot rows\? Hand over y\.argmax"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(clients: Any, words: str) -> None:
    test = None if "one-hot" in words else TEST
    with pytest.raises(FedsimError, match=words) as caught:
        train(clients, test)
    assert isinstance(caught.value, ConfigError | DataError)


def test_a_model_that_cannot_take_the_inputs_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"model: Linear cannot compute two samples of shape \(4,\) \(float32\)"
    ):
        train(PLAIN, TEST, linear(features=5))


def test_a_label_of_the_test_set_only_needs_an_output_too() -> None:
    x, y = TEST
    with pytest.raises(ConfigError, match=r"2 outputs, but the test set, row \d+, has the label 2"):
        train([(a, b.clamp(max=1)) for a, b in PLAIN], (x, y * 0 + 2), linear(2))


def test_whole_numbers_under_a_loss_of_ones_own_cost_no_memory_and_have_no_accuracy() -> None:
    def squared(output: Tensor, y: Tensor) -> Tensor:
        return (output.squeeze(1) - y.float() / 1e9).square().mean()

    prices = [(x, torch.arange(len(y)) * 10**9) for x, y in PLAIN]
    tracemalloc.start()
    result = train(prices, prices[0], linear(1), loss=squared)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20 and "accuracy" not in result.rows[-1]
    x, y = prices[0]
    output = x @ result.weights["weight"].T + result.weights["bias"]
    assert result.rows[-1]["loss"] == pytest.approx(float(squared(output, y)), rel=1e-5)


def test_targets_that_are_nan_are_named_as_such(caplog: pytest.LogCaptureFixture) -> None:
    """Under a loss of one's own: one that leaves them out trains as if they were not there; another is told why."""
    first = [(x, x[:, :1].clone()) for x, _ in PLAIN]
    gaps = [(x, y.clone()) for x, y in first]
    gaps[2][1][1] = float("nan")

    def masked(output: Tensor, y: Tensor) -> Tensor:
        there = ~y.isnan()
        return ((output - y.nan_to_num()).square() * there).sum() / there.sum()

    fewer = [*first[:2], tuple(t[[0, 2]] for t in first[2]), *first[3:]]
    whole = ("client.epochs=1", "client.batch_size=12", "strategy.weighting=uniform", "rounds=1")
    found, same = (train(c, None, linear(1), *whole, loss=masked).weights for c in (gaps, fewer))
    torch.testing.assert_close(found, same, rtol=1e-6, atol=1e-7)
    assert "client 2, row 1: the target is not finite; the loss must leave it out" in caplog.text

    row = train(gaps, None, linear(1), loss=F.mse_loss).rows[-1]
    (failure,) = row["failures"]
    assert failure["client"] == 2 and "the target of its row 1 is NaN or infinite" in failure["reason"]
    assert "lr" not in failure["reason"]


@pytest.mark.parametrize("squeezed", [False, True])
def test_one_logit_is_measured_by_the_threshold(squeezed: bool) -> None:
    model = nn.Sequential(linear(1), nn.Flatten(0)) if squeezed else linear(1)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output.reshape(-1), y.float())

    two = [(x, (x[:, 0] > 0.4).long()) for x, _ in PLAIN]
    result = train(two, two[1], model, "client.lr=1", "evaluation.by_class=true", loss=loss)
    x, y = two[1]
    weight, bias = result.weights.values()
    guess = ((x @ weight.T + bias).squeeze(1) > 0).long()
    row = result.rows[-1]
    assert row["accuracy"] == pytest.approx(float((guess == y).double().mean()))
    assert row["class_accuracy"] == pytest.approx(
        [float((guess[y == c] == c).double().mean()) for c in (0, 1)]
    )
    f1 = [
        2 * float(((guess == c) & (y == c)).sum()) / float((guess == c).sum() + (y == c).sum())
        for c in (0, 1)
    ]
    assert row["macro_f1"] == pytest.approx(sum(f1) / 2)


def source(kind: str = "floats") -> Dataset:
    """A source of somebody's own: 40 samples whose targets are of some ``kind``."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    y = {
        "floats": x[:, 0],
        "many": (x > 0).long(),
        "from 1": torch.arange(40) % 2 + 1,
        "nan": torch.arange(40) % 2,
    }[kind]
    if kind == "nan":
        x[7, 3] = float("nan")
    return Dataset(Samples(x, y), Samples(x[:5].nan_to_num(), y[:5]))


def configured(kind: str, *overrides: str, **given: Any) -> fedsim.RunResult:
    """One round of a source of this file."""
    config = compose_quickly(
        ("engine=serial", *QUIET, "rounds=1", "num_clients=4", "clients_per_round=4", *overrides)
    )
    config.data = {"_target_": f"{__name__}.source", "kind": kind}
    return run(config, fresh=True, **given)


def test_sources_pass_the_same_door() -> None:
    with pytest.raises(DataError, match=r"the training set, row 0: target .*is a number"):
        configured("floats", "partition=iid")
    result = configured(
        "floats", "partition=iid", model=linear(1), loss=lambda o, y: (o[:, 0] - y).square().mean()
    )
    assert "accuracy" not in result.rows[-1]
    with pytest.raises(DataError, match=r"client \d, row \d+ \(row 7 of all\), column 3: the value is NaN"):
        configured("nan", "partition=iid")
    result = configured("from 1", "model=linear", "partition=dirichlet")
    assert result.weights["head.weight"].shape == (2, 4)


def test_several_targets_per_sample_are_not_split_as_if_they_were_one_class() -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, y.float())

    with pytest.raises(
        DataError, match=r"got int64 of shape \(40, 4\).*cannot be split by label.*partition=iid"
    ):
        configured("many", "partition=dirichlet", model=linear(4), loss=loss)
    assert "accuracy" not in configured("many", "partition=iid", model=linear(4), loss=loss).rows[-1]


def test_a_node_reads_its_own_data_through_the_same_door() -> None:
    config = compose_quickly(("num_clients=3", "partition=iid"))
    config.data = {"_target_": f"{__name__}.source", "kind": "nan"}
    with pytest.raises(DataError, match=r"client 2, row 7 \(row 7 of all\), column 3"):
        samples.owned(config, samples.dataset(config), 2)
    config.data.kind = "from 1"
    found = samples.dataset(config)
    assert found.classes == ("1", "2") and found.train.y[:3].tolist() == [0, 1, 0]


def test_a_source_that_gives_something_else_is_named(tmp_path: Path) -> None:
    config = compose_quickly(())
    config.data = {"_target_": "builtins.dict"}
    with pytest.raises(
        ConfigError, match=r"data: builtins\.dict gave dict, expected a fedsim\.data\.dataset\.Dataset"
    ):
        samples.dataset(config)


def test_classification_of_before_is_untouched() -> None:
    problem = classification()
    given = samples.admitted(compose_quickly(()), samples.Given(clients=problem.clients, test=problem.test))
    assert all(
        a is b
        for p, q in zip(given.clients or (), problem.clients, strict=True)
        for a, b in zip(p, q, strict=True)
    )
    assert given.classes == ("0", "1", "2")


PIXELS, THREE = torch.arange(64 * 6, dtype=torch.uint8).view(6, 1, 8, 8), torch.tensor([0, 1, 2] * 2)
SAID = "x{} holds whole numbers up to 255 ({}) and is trained on as it is, not scaled to [0, 1]; hand over x / 255"


class Named(nn.Sequential):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.float())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": (PIXELS, THREE)}, "data: " + SAID.format("", "uint8")),
        ({"data": {"x": PIXELS.numpy().astype(np.int64), "y": THREE}}, "data: " + SAID.format("", "int64")),
        ({"data": ({"image": PIXELS}, THREE)}, "data: " + SAID.format("['image']", "uint8")),
        ({"clients": [(PIXELS, THREE)] * 2}, "clients: " + SAID.format("", "uint8")),
        (
            {"clients": dict.fromkeys("ab", (PIXELS.flatten(1), THREE))},
            "clients: " + SAID.format("", "uint8"),
        ),
        ({"clients": [(PIXELS / 255, THREE)] * 2}, ""),
        ({"clients": [(PIXELS > 9, THREE)] * 2}, ""),
        ({"data": Dataset(Samples(PIXELS, THREE), normalize=Normalize(1 / 255))}, ""),
    ],
)
def test_pixels_that_nobody_scales_are_said_once(
    given: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    layers = Named if "image" in str(given)[:20] else nn.Sequential
    settings = ["engine=serial", *QUIET, "rounds=1", "num_clients=2", "clients_per_round=2", "partition=iid"]
    fedsim.simulate(settings, model=lambda: layers(nn.Flatten(), nn.Linear(64, 3)), **given)
    lines = [r.getMessage() for r in caplog.records if "not scaled" in r.getMessage()]
    assert [line.startswith(said) for line in lines] == [True] * bool(said)
