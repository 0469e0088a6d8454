"""Data sets and loaders with their own way of giving samples: used as they give them, or refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fedsim.data.containers import part
from fedsim.data.door import admit_parts
from fedsim.data.frames import from_frame
from fedsim.data.joining import together
from fedsim.data.labels import TargetRules
from fedsim.errors import DataError

X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 1, 0])


class Rows(Dataset):
    """Samples one by one."""

    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        return X[i], int(Y[i])


def test_pieces_of_one_tensor_are_used_where_they_lie():
    """In order and without gaps; else they are put together."""
    whole = together([(X[:1], Y[:1]), (X[1:4], Y[1:])]).x
    assert whole.data_ptr() == X.data_ptr() and torch.equal(whole, X)
    assert together([(X[1:2], Y[1:2]), (X[2:3], Y[2:3])]).x.tolist() == X[1:3].tolist()
    for pieces in ((X[2:], X[:2]), (X[:1], X[2:]), (X[:2].clone(), X[2:]), (X[:2, :2], X[2:, :2])):
        found = together([(x, Y[: len(x)]) for x in pieces]).x
        assert torch.equal(found, torch.cat(pieces)) and found.data_ptr() != X.data_ptr()


def read(*clients):
    """The clients' pairs after the door."""
    return admit_parts([part(f"client {i}", c) for i, c in enumerate(clients)], TargetRules())[0]


class Doubled:
    """Samples of a torch data set with inputs twice as large."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return 2 * x, y

    def __getitems__(self, rows):
        return [self[i] for i in rows]


WHOLE = TensorDataset(X, Y)


@pytest.mark.parametrize(
    ("kind", "given"), [(TensorDataset, (X, Y)), (Subset, (WHOLE, range(4))), (ConcatDataset, ([WHOLE],))]
)
def test_a_subclass_gives_samples_its_own_way(kind, given):
    made = type("Own", (Doubled, kind), {})(*given)
    for data in (made, Subset(made, range(4))):
        ((x, _),) = read(data)
        assert torch.equal(x.take(torch.arange(4))[0], 2 * X)
    short = type("Short", (kind,), {"__len__": lambda self: 2})(*given)
    assert len(part("client 0", short)) == 2
    ((x, _),) = read(type("Named", (kind,), {"name": "a"})(*given))
    assert torch.equal(x, X)


def test_subsets_of_rows_one_after_the_other_are_views_of_what_they_are_parts_of():
    halves = read(*(Subset(WHOLE, rows) for rows in (range(2), [2, 3])))
    assert together(halves).x.data_ptr() == X.data_ptr()
    for rows in ([-2, -1], [1, 0], [0, 2], [3]):
        ((x, y),) = read(Subset(WHOLE, rows))
        assert torch.equal(x, X[rows]) and torch.equal(y, Y[rows])


def test_a_loader_goes_through_the_samples_of_its_sampler():
    ((x, y),) = read(DataLoader(WHOLE, sampler=SubsetRandomSampler([2, 0])))
    assert torch.equal(x, X[[2, 0]]) and torch.equal(y, Y[[2, 0]])
    weighted = WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], 4)
    for options in (
        {"sampler": weighted},
        {"sampler": RandomSampler(WHOLE, replacement=True)},
        {"batch_sampler": BatchSampler(weighted, 2, False)},
        {"batch_sampler": [[0, 1]]},
    ):
        with pytest.raises(DataError, match=r"client 0 is a DataLoader with .*Subset\(data, rows\)"):
            read(DataLoader(WHOLE, **options))


def test_formats_of_hugging_face_data_sets():
    hub = pytest.importorskip("datasets")
    made = hub.Dataset.from_dict({"a": [1.0, 2.0], "b": [3.0, 4.0], "label": [0, 1]})
    shown = part("client 0", made.with_format("numpy", columns=["a", "label"]))
    assert shown.read.x == ("a",) and shown.read.y == "label"
    with pytest.raises(DataError, match=r"client 0: its rows go through a transform .*data.map"):
        part("client 0", made.with_transform(lambda rows: {"a": [2 * v for v in rows["a"]]}))
    with pytest.raises(DataError, match="its rows go through a format of its own"):
        part("client 0", made.with_format("numpy", dtype=np.float16))


def test_dicts_take_the_order_of_the_first_clients():
    (a, _), (b, _) = read(({"a": X, "b": Y}, Y), ({"b": Y, "a": X}, Y))
    assert list(a) == list(b) == ["a", "b"] and torch.equal(b["a"], X)


class Broken(Rows):
    """Samples of which one cannot be read."""

    def __getitem__(self, i):
        if i == 3:
            raise ValueError("no such file")
        return super().__getitem__(i)


def test_a_sample_that_cannot_be_read_is_named():
    with pytest.raises(DataError, match=r"client 1, row 3: cannot be read \(ValueError: no such file\)"):
        read(Rows(), Broken())


@pytest.mark.parametrize(
    "test", [[0, 1, 0], ["False", "True", "False"], [False, True, False], ["x", "Test", "x"]]
)
def test_rows_of_the_test_set(test):
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "y": [0, 1, 1], "test": test, "who": ["u", "v", "u"]})
    assert from_frame(frame, y="y", x=["a"], test="test").test.x.tolist() == [[2.0]]
    for column, values, words in (
        ("test", ["a", "b", "b"], "column 'test' holds a, b; expected true and false"),
        ("test", [True, None, False], "column 'test', row 1 is empty"),
        ("who", ["u", None, "v"], "column 'who', row 1 is empty"),
    ):
        with pytest.raises(DataError, match=words):
            from_frame(frame.assign(**{column: values}), y="y", x=["a"], test="test", client="who")


def test_several_columns_of_a_frame_are_targets():
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "u": [True, False, True], "v": [0, 1, 1]})
    found = from_frame(frame, y=["v", "u"])
    assert found.train.x.tolist() == [[1], [2], [3]] and found.train.y.tolist() == [[0, 1], [1, 0], [1, 1]]
    with pytest.raises(DataError, match="no column 'w'"):
        from_frame(frame, y=["v", "w"])
