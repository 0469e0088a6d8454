"""What a client's samples may be handed over as, and what is said about other kinds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
)

from fedsim.data.containers import listed, part
from fedsim.data.door import admit, admit_parts
from fedsim.data.labels import TargetRules
from fedsim.data.lazy import Read
from fedsim.errors import ConfigError, DataError

X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 1, 0])


class Rows(Dataset):
    """Samples one by one."""

    def __init__(self, noise=0.0):
        self.noise = noise

    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        return X[i].numpy() + self.noise * np.random.rand(), int(Y[i])


class Ragged(Rows):
    """Samples of several lengths."""

    def __getitem__(self, i):
        return torch.zeros(i + 1), int(Y[i])


class Stream(IterableDataset):
    """Samples without an end."""

    def __iter__(self):
        return iter(())


def read(*clients):
    """The clients' pairs after the door."""
    return admit_parts([part(f"client {i}", c) for i, c in enumerate(clients)], TargetRules())[0]


@pytest.mark.parametrize(
    "given",
    [
        (X, Y),
        [X.numpy(), Y.numpy()],
        (X.numpy().astype(">f4"), Y.numpy().astype(">i8")),
        (X.numpy()[:, ::-1][:, ::-1], Y.numpy()[::-1][::-1]),
        (X.tolist(), Y.tolist()),
        (list(X), list(Y)),
        (pd.DataFrame(X.numpy()), pd.Series(Y.numpy())),
        (pd.DataFrame(X.numpy()).astype("Float32"), pd.Series(Y.numpy(), dtype="Int64")),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True),
        ConcatDataset([TensorDataset(X[:1], Y[:1]), TensorDataset(X[1:], Y[1:])]),
        Rows(),
    ],
)
def test_the_same_samples_in_every_container(given):
    ((x, y),) = read(given)
    if isinstance(x, Read):
        x, y = x.take(torch.arange(len(x)))
    assert torch.equal(x.float(), X) and torch.equal(y, Y)


@pytest.mark.parametrize(
    "given",
    [
        ({"a": X, "b": (X[:, 0], X)}, Y),
        {"x": {"a": X, "b": (X[:, 0], X)}, "y": Y},
        ({"a": X.numpy(), "b": (X[:, 0].numpy(), X.numpy())}, Y.tolist()),
    ],
)
def test_trees_of_inputs(given):
    ((x, y),) = read(given)
    assert list(x) == ["a", "b"] and type(x["b"]) is tuple and torch.equal(y, Y)
    assert torch.equal(x["a"], X) and torch.equal(x["b"][0], X[:, 0]) and torch.equal(x["b"][1], X)


def test_a_tuple_is_several_inputs_or_one_for_each_sample():
    ((x, _),) = read(((X, X[:, :1]), Y))
    assert type(x) is tuple and x[1].shape == (4, 1)
    ((x, _),) = read((tuple(X), Y))
    assert torch.equal(x, X)
    ((x, y),) = read(TensorDataset(X, X, Y))
    assert type(x) is tuple and torch.equal(y, Y)


def test_targets_may_be_missing_or_a_tree():
    ((x, y),) = read((X, None))
    assert torch.equal(x, X) and y is None
    ((x, y),) = read({"ids": Y, "labels": Y})
    assert sorted(x) == ["ids", "labels"] and y is None
    ((_, y),) = read((X, {"boxes": X[:, None], "labels": Y[:, None]}))
    assert y["boxes"].shape == (4, 1, 3) and y["labels"].dtype == torch.int64


def test_trees_must_agree():
    for given, words in (
        (
            ({"a": X, "c": X}, Y),
            r"client 1: its x is made of \['a'\], \['c'\], that of client 0 of \['a'\], \['b'\]",
        ),
        (({"a": X, "b": X[:3]}, Y), r"client 1, x\['b'\]: has 3 entries for 4 samples"),
        (
            ({"a": X, "b": X[:, :2]}, Y),
            r"client 1, \['b'\]: samples of shape \(2,\), client 0, \['b'\] has \(3,\)",
        ),
        ((X, Y), "its x is made of one array"),
        (Rows(), "hands over arrays, others data sets"),
    ):
        with pytest.raises(DataError, match=words):
            read(({"a": X, "b": X}, Y), given)


def test_plain_tensors_are_not_copied():
    ((x, y),) = read((X, Y))
    assert x is X and y is Y


def test_columns_of_frames_go_by_name():
    frame = pd.DataFrame({"age": [1.0, 2.0], "height": [3.0, 4.0]})
    (a, _), (b, _) = read((frame, [0, 1]), (frame[["height", "age"]], [1, 0]))
    assert torch.equal(a, b) and a.tolist() == [[1.0, 3.0], [2.0, 4.0]]
    with pytest.raises(
        DataError, match="client 1: its columns are not those of client 0: 'age' is in one only"
    ):
        read((frame, [0, 1]), (frame.rename(columns={"age": "weight"}), [1, 0]))


def test_inputs_take_one_type():
    (a, _), (b, _) = read((X > 3, Y), (X, Y))
    assert a.dtype == torch.float32 and a[1].tolist() == [0.0, 1.0, 1.0] and b is X
    (a, _), (b, _) = read((X.half(), Y), (np.array([]), np.array([])))
    assert a.dtype == torch.float16 and b.shape == (0, 3) and b.dtype == torch.float16
    ((a, _),) = read((X > 3, Y))
    assert a.dtype == torch.uint8 and a.tolist() == (X > 3).int().tolist()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (({}, Y), "client 0, x is an empty dict"),
        ((X, Y, Y), r"is a tuple of 3; hand over \(x, y\)"),
        (X, r"client 0 is Tensor; hand over \(x, y\)"),
        (
            pd.DataFrame(X.numpy()),
            r"is a DataFrame; hand over \(frame\[features\], frame\[label\]\), or .*from_frame",
        ),
        ((X.to_sparse(), Y), "sparse.*to_dense"),
        (([[1.0, 2.0], [3.0]], [0, 1]), r"client 0, x, row 1 has shape \(1,\), row 0 has \(2,\)"),
        ((pd.DataFrame({"a": ["u", "v"]}), [0, 1]), "client 0, x, column 'a' holds.*get_dummies"),
        ((pd.DataFrame({"a": pd.array([1, None], "Int64")}), [0, 1]), "column 'a', row 1 is empty"),
        ((pd.DataFrame({"a": [1.0, np.nan]}), [0, 1]), "client 0, row 1, column 'a': the value is NaN"),
        ((np.ma.masked_array([[1.0], [2.0]], [[0], [1]]), [0, 1]), "row 1 has a masked entry"),
        (([["a"], ["b"]], [0, 1]), r"client 0: inputs are text \('a'\)"),
        ((X.to(torch.complex64), Y), "complex"),
        ((X, 3), "client 0, y is a single value"),
        ((X, ["a", 1, "b", "c"]), "client 0, y, row 1 mixes text and numbers"),
        ((None, Y), "client 0, x is None"),
        (({"a": X, "b": None}, Y), r"client 0, x\['b'\] is None"),
        ((X.to("meta"), Y), "client 0, x is on the meta device"),
        (Stream(), "is a Stream, which has no length"),
        (Ragged(), "is a Ragged whose first samples make no batch.*collate_fn"),
        ((np.array(["2020-01-01"] * 4, dtype="datetime64[D]")[:, None], Y), "datetime64"),
    ],
)
def test_other_kinds_are_refused_by_client_and_remedy(given, words):
    with pytest.raises(DataError, match=words):
        read(given)


def test_bytes_beside_floats_are_refused():
    with pytest.raises(
        DataError, match="client 1: inputs are uint8, those of client 0 float32: are they on one scale"
    ):
        read((X, Y), (X.to(torch.uint8), Y))


def test_targets_of_another_shape_are_named_as_targets():
    with pytest.raises(ConfigError, match=r"clients\[1\]: targets of shape \(2,\), client 0 has \(\)"):
        read((X, Y), (X, torch.zeros(4, 2)))


def test_clients_may_be_a_mapping_or_any_iterable():
    assert listed({"b": 1, "a": 2}) == [1, 2] and listed(iter([3])) == [3]
    for wrong in (X, pd.DataFrame(X.numpy()), DataLoader(Rows()), 3):
        with pytest.raises(
            DataError, match=r"clients: got .*expected a list with one \(x, y\) pair per client"
        ):
            listed(wrong)


@pytest.mark.parametrize(
    ("shape", "at", "words"),
    [
        ((4, 3), (2, 1), "client 0, row 2, column 1: the value is infinite"),
        ((4, 3, 2, 5), (3, 1, 0, 4), "row 3, channel 1, pixel row 0, pixel column 4"),
        ((4, 3, 2), (1, 2, 0), r"row 1, entry \(2, 0\)"),
    ],
)
def test_the_place_of_what_is_not_finite_is_named(shape, at, words):
    from fedsim.data.door import refuse_nonfinite

    x = torch.zeros(shape)
    refuse_nonfinite("client 0", x)
    refuse_nonfinite("client 0", torch.full(shape, 3e38))  # whose sum overflows
    x[at] = float("inf")
    with pytest.raises(DataError, match=words):
        refuse_nonfinite("client 0", x)


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        ([2, 1, 2, 1], ("1", "2")),
        ([1.0, 0.0, 1.0, 0.0], ("0", "1")),
        ([True, False, True, False], ("0", "1")),
    ],
)
def test_labels_in_columns_of_hugging_face_become_classes(held, names):
    datasets = pytest.importorskip("datasets")
    from fedsim.data.huggingface import from_hf

    rows = datasets.Dataset.from_dict({"x": [[0.0], [1.0], [2.0], [3.0]], "label": held})
    with_test = admit(from_hf(rows, x="x", test=rows.select([1, 2])), TargetRules())
    ((direct, _),), classes = admit_parts([part("data", rows)], TargetRules())
    assert with_test.classes == classes == names
    for read, wanted in ((with_test.train, [1, 0, 1, 0]), (with_test.test, [0, 1]), (direct, [1, 0, 1, 0])):
        y = read.take(torch.arange(len(read)))[1]
        assert y.tolist() == wanted and y.dtype == torch.int64 and torch.equal(y, read.labels)
    if isinstance(held[0], str):
        with pytest.raises(DataError, match="targets are text, but this task takes numbers"):
            admit(from_hf(rows, x="x"), TargetRules(own_loss=True, kind="numbers"))
