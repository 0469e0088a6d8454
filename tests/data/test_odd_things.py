"""Containers and values that nobody expects end in one line that names whose they are and what to hand over."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from plainloop import samples, seeded, simulated
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fedsim.data.containers import part
from fedsim.data.decoding import decode
from fedsim.data.frames import from_frame
from fedsim.data.image_tables import parquet
from fedsim.data.multidomain import check_set
from fedsim.errors import ConfigError, DataError

X, Y = samples()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((X, set(Y.tolist())), r"client 0, y is a set; hand over an array"),
        ((X, (v for v in Y.tolist())), r"client 0, y is a generator"),
        ((X, iter(Y.tolist())), r"client 0, y is a list_iterator"),
        (
            (X, [datetime.date(2020, 1, 1 + int(v)) for v in Y]),
            r"client 0, y, row 0 is a date; turn it into numbers",
        ),
        ((np.full((12, 2), Decimal("0.5"), dtype=object), Y), r"client 0, x, row 0 holds a Decimal; turn it"),
        (
            (torch.nested.nested_tensor([*X.float()]), Y),
            r"client 0, x is a sparse, nested or quantised tensor",
        ),
        (Subset(TensorDataset(X, Y), [0, 99]), r"client 0 is a Subset with row 99 of 12 samples"),
        (
            (pd.DataFrame(X.numpy()), pd.Series(Y.numpy()[::-1], index=range(11, -1, -1))),
            r"client 0 has x and y with one index in two orders",
        ),
    ],
)
def test_refused_by_client(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        part("client 0", given)


def test_an_index_of_its_own_is_no_other_order() -> None:
    found = part("client 0", (pd.DataFrame(X.numpy()), pd.Series(Y.numpy(), index=range(50, 62))))
    assert torch.equal(found.y, Y)


def test_clients_without_any_sample() -> None:
    with pytest.warns(UserWarning, match="clients: none of them has a sample"):
        simulated(nn.Linear(4, 3), data=[(torch.empty(0, 4), torch.empty(0))], test=(X, Y))


class Late(Dataset[Any]):
    """Read when needed; the sixth row is no number."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return X[i] * (float("nan") if i == 5 else 1), int(Y[i])


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def no_loss(o: Tensor, y: Tensor) -> Tensor:
    return o.sum() * float("nan")


@pytest.mark.parametrize(
    ("data", "loss", "said"),
    [
        (Late(), None, "its row 5, column 0, is NaN: fill or drop it"),
        ((X, Y), no_loss, "its loss was NaN before its first step"),
    ],
)
def test_what_is_not_finite_is_named(data: Any, loss: Callable[..., Tensor] | None, said: str) -> None:
    dtype = ("dtype=float32",) if isinstance(data, tuple) else ()
    rows = simulated(seeded(linear), "rounds=1", *dtype, data=[data], loss=loss).rows
    assert said in rows[0]["failures"][0]["reason"]


def test_doubles_that_are_infinite_in_float32() -> None:
    x = torch.where(X[3, 2] == X, 1e300, X)
    with pytest.raises(
        DataError, match=r"client 0, row 3 .*column 2: the value is 1e\+300, infinite in float32"
    ):
        simulated(seeded(linear), "rounds=1", "dtype=float32", data=[(x, Y)])


def test_columns_that_float32_makes_one_value_of_are_said(caplog: pytest.LogCaptureFixture) -> None:
    seconds = X.double() + torch.tensor([0.0, 0.0, 1.7e9, 0.0])
    constant = X.double() * torch.tensor([1.0, 1.0, 0.0, 1.0]) + 0.1
    for x, dtype, said in (
        (seconds, "float32", True),
        (seconds, "float64", False),
        (constant, "float32", False),
    ):
        caplog.clear()
        simulated(seeded(linear), "rounds=1", f"dtype={dtype}", data=[(x, Y)])
        assert ("values of column 2 lie around 1.7e+09 with a deviation of" in caplog.text) == said


def test_one_class_for_one_output_is_nothing_to_learn() -> None:
    with pytest.raises(
        ConfigError, match="Linear has one output and all labels are 0: their cross entropy is 0"
    ):
        simulated(nn.Linear(X.shape[1], 1), data=[(X, torch.zeros_like(Y))])


def test_weights_that_are_nan_from_the_start() -> None:
    model = seeded(linear)
    with torch.no_grad():
        model.weight[0, 1] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(ConfigError, match=r"model: 'weight' holds NaN or infinity \(1 of 12 numbers\)"):
        simulated(model)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (nn.CrossEntropyLoss, r"loss: is a class; .* hand over an object, CrossEntropyLoss\(\)"),
        ("mse", "loss: is a str; .* type task.loss=mse"),
        (lambda o, y: None, "loss: gave NoneType; .* is there a return"),
        (lambda o, y: (o.mean(), 1), "loss: gave tuple; return one tensor"),
        (
            lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"),
            r"loss: gave shape \(2,\) for two",
        ),
    ],
)
def test_what_is_no_loss(loss: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulated(seeded(linear), loss=loss)


def test_another_set_of_domains() -> None:
    arrays = {"domain": np.array(["amazon", "dslr"])}
    with pytest.raises(DataError, match="it is office_caltech10, not pacs; type data=office_caltech10"):
        check_set("pacs", arrays, "folder")
    check_set("None", arrays, "folder")
    check_set("office_caltech10", arrays, "folder")


def test_columns_of_one_name() -> None:
    frame = pd.DataFrame([[1.0, 2.0, 0], [1.0, 3.0, 1]], columns=["a", "a", "y"])
    with pytest.raises(DataError, match="there are several columns 'a'"):
        from_frame(frame, y="y")


@pytest.mark.parametrize(
    ("labels", "said"),
    [([-1, 0, 1], "has the label -1"), (["", "b", "c"], "has empty labels"), ([-1, 1, 1], "")],
)
def test_labels_in_files_that_are_none(labels: list[Any], said: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table = pa.table({"image": [(tmp_path / "a.png").read_bytes()] * 3, "label": labels})
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=said) if said else nullcontext():
        parquet(tmp_path, image="image", label="label")


def test_an_unreadable_image_is_named_by_its_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    blobs = [(tmp_path / "a.png").read_bytes(), b"hello"]
    with pytest.raises(DataError, match=r"set.a/x.png: not a readable image \(5 bytes of no known format\)"):
        decode(blobs, channels=3, size=None, source="set", names=["a/a.png", "a/x.png"])
