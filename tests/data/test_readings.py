"""Tuples, lists and named tuples of arrays: several inputs, or an entry for each sample."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from handing import train
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedsim.data.containers import Part, part, parts
from fedsim.data.dataset import Samples
from fedsim.data.door import admit_parts
from fedsim.data.labels import TargetRules
from fedsim.errors import DataError
from fedsim.models.split import call


class Pair(NamedTuple):
    """Two inputs by name."""

    a: Any
    b: Any


@dataclass
class Record:
    """Two inputs, as no tree."""

    a: Any
    b: Any


def several(n: int, kind: Any = list, width: int = 4) -> Any:
    """Two inputs of ``n`` samples, of 3 and ``width`` numbers."""
    a, b = torch.arange(3.0 * n).reshape(n, 3), torch.ones(n, width)
    return kind(a, b) if kind is Pair else kind((a, b))


def made(*given: Any) -> list[Part]:
    return parts({f"client {i}": one for i, one in enumerate(given)})


@pytest.mark.parametrize("kind", [list, tuple, Pair])
@pytest.mark.parametrize("sizes", [(5, 1, 3), (2, 4), (2, 1, 2)])
def test_inputs_with_entries_of_all_samples_are_several(kind: Any, sizes: tuple[int, ...]) -> None:
    for width in (3, 4):
        found = made(*((several(n, kind, width), torch.zeros(n).long()) for n in sizes))
        assert all(
            type(p.x) is kind and len(p.x) == 2 and len(p) == n for p, n in zip(found, sizes, strict=True)
        )


def test_as_many_inputs_as_samples_are_read_as_the_others_are_or_by_kind() -> None:
    y = torch.zeros(2).long()
    assert type(part("data", (several(2, tuple, 3), y)).x) is tuple  # a tuple: several inputs
    assert part("data", (several(2, list, 3), y)).x.shape == (2, 2, 3)  # a list: of samples
    assert type(part("data", Samples(several(2, list, 3), y)).x) is list  # which holds trees
    both = made((several(2, tuple, 3), y), ([torch.zeros(2, 3)] * 5, [0] * 5))
    assert [p.x.shape for p in both] == [(2, 2, 3), (5, 2, 3)]


def test_without_targets_samples_of_one_shape_are_samples() -> None:
    assert part("data", ([torch.zeros(2, 3)] * 4, None)).x.shape == (4, 2, 3)
    assert len(part("data", (several(5), None))) == 5
    assert [type(p.x) for p in made((several(2, list, 3), None), (several(3, list, 3), None))] == [list, list]


def test_targets_and_nested_trees() -> None:
    x = {"p": [torch.zeros(4, 1), Pair(np.ones((4, 2)), torch.ones(4))]}
    found = part("data", (x, several(4)))
    assert type(found.x["p"][1]) is Pair and found.x["p"][1].a.shape == (4, 2) and type(found.y) is list


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (([torch.zeros(2, 3), torch.zeros(4, 3)], [0, 1]), "x, row 1 has shape .*pad or cut"),
        (([torch.zeros(5, 3), torch.zeros(4, 3)], [0] * 5), r"x\[1\]: has 4 entries for 5 samples"),
        ((Pair(torch.zeros(5, 3), torch.zeros(4, 3)), [0] * 5), "x.b: has 4 entries for 5 samples"),
        (
            (Record(torch.zeros(5, 3), torch.zeros(5, 3)), [0] * 5),
            r"x is a dataclass, Record; hand over vars",
        ),
    ],
)
def test_what_has_no_reading_is_refused(given: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        admit_parts(made(given), TargetRules())


def test_who_has_no_sample_has_any_tree() -> None:
    pairs, _ = admit_parts(made((several(4), [0, 1, 0, 1]), ([], []), (several(3), [0, 1, 1])), TargetRules())
    assert [t.shape for t in pairs[1][0]] == [(0, 3), (0, 4)] and pairs[1][1].shape == (0,)


class Both(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.a(a) + self.b(b)  # type: ignore[no-any-return]


class OfOne(Both):
    """The same of both in one argument."""

    def forward(self, x: Any) -> Tensor:  # type: ignore[override]
        return Both.forward(self, *x)


class Rows(Dataset):  # type: ignore[type-arg]
    """Samples ((a, b), y), which torch collates to lists."""

    def __init__(self, n: int) -> None:
        self.x, self.n = several(n), n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return tuple(t[i] for t in self.x), i % 2


def test_a_tree_trains_alike_in_every_kind_and_model() -> None:
    def hashed(own: Any, model: Any, vectorize: str) -> str:
        found = train(own, own[1], model(), f"engine.vectorize={vectorize}", "clients_per_round=2")
        return str(found.history["weights_hash"].iloc[-1])

    def clients(kind: Any) -> Any:
        return [(several(n, kind), torch.arange(n) % 2) for n in (6, 9, 2)]

    stacked = {hashed(clients(k), m, "on") for k, m in ((list, Both), (tuple, OfOne), (Pair, Both))}
    by_one = {hashed(clients(k), m, "off") for k, m in ((list, OfOne), (tuple, Both), (Pair, OfOne))}
    read = {hashed([Rows(n) for n in (6, 9, 2)], m, "off") for m in (Both, OfOne)}
    assert len(stacked) == len(by_one) == len(read) == 1


def test_entries_are_arguments_where_the_model_takes_several() -> None:
    assert call(lambda a, b: (a, b), (1, 2)) == (1, 2) == call(lambda a, b: (a, b), [1, 2])
    assert call(lambda x: x, (1, 2)) == (1, 2) and call(lambda x: x, [1, 2]) == [1, 2]
    assert call(lambda x, mask=None: (x, mask), (1, 2)) == (1, 2)
    assert call(lambda x, mask=None: (x, mask), [1, 2]) == ([1, 2], None)
    assert call(lambda *x: x, (1, 2)) == (1, 2) and call(lambda *x: x, [1, 2]) == ([1, 2],)


def test_a_test_set_may_be_a_dict_of_arrays() -> None:
    def loss(output: Any, y: Any) -> Any:
        return output.square().mean()

    found = train(
        [({"a": x[0], "b": x[1]}, None) for x in map(several, (4, 5))],
        dict(zip("ab", several(4), strict=True)),
        Both(),
        "clients_per_round=2",
        loss=loss,
    )
    assert found.history["loss"].iloc[-1] >= 0


class Packed(nn.Module):
    """A recurrent model of packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.out = nn.LSTM(1, 3), nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        return self.out(self.rows(x)[1][0][-1])


def test_packed_sequences_go_to_the_model_as_one() -> None:
    rows = [(torch.ones(1 + i % 3, 1), i % 2) for i in range(8)]

    def collate(batch: Any) -> Any:
        x = nn.utils.rnn.pack_sequence([x for x, _ in batch], enforce_sorted=False)
        return x, torch.tensor([y for _, y in batch])

    own = DataLoader(rows, collate_fn=collate)  # type: ignore[arg-type]
    assert train([own, own], own, Packed(), "clients_per_round=2").history["accuracy"].iloc[-1] >= 0


class Language(nn.Module):
    """Works out its own loss, as those of ``transformers`` do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.out(self.table(input_ids))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def test_labels_and_tokens_of_narrow_integers_are_read_as_wide_ones() -> None:
    def hashed(kind: Any, labels: Any) -> str:
        x = np.arange(40).reshape(8, 5) % 9
        own = {"input_ids": x.astype(kind), "labels": x.astype(labels)}
        found = train([own, own], None, Language(), "clients_per_round=2")
        return str(found.history["weights_hash"].iloc[-1])

    wide = hashed(np.int64, np.int64)
    assert {hashed(np.int32, np.int32), hashed(np.int16, np.int16), hashed(np.int8, np.int64)} == {wide}


@pytest.mark.parametrize("made_of", [int, bool, float, lambda v: ["no", "yes"][v]])
def test_labels_of_tables_are_classes_whatever_their_type(made_of: Any) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [[1.0], [2.0], [3.0]], "label": [made_of(v) for v in (0, 1, 1)]})
    ((found, _),), classes = admit_parts(made(table), TargetRules())
    assert found.take(torch.tensor([0, 2]))[1].tolist() == [0, 1] and len(classes) == 2


def test_gaps_among_labels_of_tables_are_refused_by_row() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [[1.0], [2.0]], "label": [1, None]})
    with pytest.raises(DataError, match="client 0, row 1: the target is NaN"):
        admit_parts(made(table), TargetRules())
