"""Tables of numbers: heart disease with odd cells, fleets whose rows name their clients, targets and partitions."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from fedsim.data import partition, sources
from fedsim.data.bydomain import domains
from fedsim.data.tabular import HEART_COLUMNS
from fedsim.errors import DataError
from fedsim.system.devices import Table


def heart(path, change):
    """Twelve patients whose attributes count up, after ``change(rows)``."""
    rows = [
        dict.fromkeys(HEART_COLUMNS, str(i)) | {"hospital": "h", "split": "test" if i < 3 else "train"}
        for i in range(1, 13)
    ]
    for i, row in enumerate(rows):
        row["target"] = str(i % 2)
    change(rows)
    with (path / "heart_disease.csv").open("w", newline="") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def setting(column, values):
    """Write ``values`` into a column, from the first patient on."""

    def change(rows):
        for row, value in zip(rows, values, strict=False):
            row[column] = value

    return change


def test_a_column_that_is_constant_in_training_is_shifted_only(tmp_path):
    values = ["0.4", "0.1", *["0.1"] * 10]
    data = sources.heart_disease(heart(tmp_path, setting("age", values)))
    assert (data.train.x[:, 0] == 0).all() and torch.isfinite(data.train.x).all()
    np.testing.assert_allclose(data.test.x[:, 0], [0.3, 0.0], rtol=1e-6)
    counted = np.arange(3, 13)
    np.testing.assert_allclose(data.train.x[:, 1], (counted - counted.mean()) / counted.std(), rtol=1e-6)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        (
            "target",
            ["0", "1", "4"],
            r"row 3: column 'target' is 4; it must be 0 .* or 1 .*target = \(num > 0\)",
        ),
        ("chol", ["1", "inf"], "row 2: column 'chol' is infinite"),
        ("age", [""] * 12, "column 'age' is empty for all training patients.*data.missing=drop"),
        ("split", ["test"] * 12, "no training patients are left"),
    ],
)
def test_odd_cells_are_named(tmp_path, column, values, words):
    with pytest.raises(DataError, match=words):
        sources.heart_disease(heart(tmp_path, setting(column, values)))


def fleet(path, clients):
    rows = [f"{c},{10 + i},1,1" for i, c in enumerate(clients)]
    path.write_text("client,speed,down,up\n" + "\n".join(rows) + "\n")
    return Table(path=str(path), draw=False)


def test_a_fleets_rows_belong_to_the_clients_they_name(tmp_path):
    rng = np.random.default_rng(0)
    assert fleet(tmp_path / "f.csv", [2, 0, 1])(3, rng).speed.tolist() == [11, 12, 10]
    assert fleet(tmp_path / "f.csv", [3, 2, 0, 1])(2, rng).speed.tolist() == [12, 13]
    for clients, words in (
        ([1, 2, 3], "client 0 has no row"),
        ([0, 1, 2, 1], "two rows"),
        (["a", 0, 1], "client 2"),
    ):
        with pytest.raises(DataError, match=f"column 'client': .*{words}|column 'client'.*no row"):
            fleet(tmp_path / "f.csv", clients)(3, rng)


@pytest.mark.parametrize(
    "y", [np.linspace(0, 1, 12), np.ones((12, 4), np.int64), np.zeros((12, 2, 3), np.float32)]
)
def test_partitions_without_labels_take_any_target(y):
    rng = np.random.default_rng(0)
    same = partition.iid(np.zeros(12, np.int64), 3, np.random.default_rng(0))
    assert all(np.array_equal(a, b) for a, b in zip(partition.iid(y, 3, rng), same, strict=True))
    ids = np.arange(12) // 4
    assert [len(p) for p in partition.natural(y, 3, rng, ids=ids)] == [4, 4, 4]
    assert [len(p) for p in domains(y, 3, rng, ids=ids)] == [4, 4, 4]
    assert sum(map(len, partition.quantity(y, 3, rng, alpha=1.0, min_samples=1))) == 12
    assert [len(p) for p in partition.everything(y, 3, rng)] == [12] * 3
    for cut, options in (
        (partition.dirichlet, {"alpha": 1.0, "min_samples": 1}),
        (partition.shards, {"shards_per_client": 2}),
        (domains, {"ids": ids, "alpha": 1.0}),
    ):
        with pytest.raises(
            DataError, match="cannot be split by label; type partition=iid, quantity or natural"
        ):
            cut(y, 3, rng, **options)


def test_tensors_go_through_the_same_door():
    x = torch.zeros(3, 2)
    assert sources.tensors(x, ["b", "a", "b"]).classes == ("a", "b")
    assert sources.tensors(x, np.array([0, 1, 0], np.int16)).train.y.dtype == torch.int64
    assert (
        sources.tensors(x, torch.tensor([1, 2, 1])).classes == ()
    )  # a run reads them: see fedsim.data.labels
    assert sources.tensors(x, torch.tensor([0, 10**12, 3])).classes == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("u,target\n", "no rows below the header"),
        ("u;target\n1,5;a\n", "cells are separated by ';' in its header; write commas"),
        ("u\ttarget\n1\ta\n", "cells are separated by .* in its header; write commas"),
    ],
)
def test_files_that_are_no_table_of_commas_are_named(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        sources.table(
            tmp_path / "t.csv", target="target", contract={"classes": ["a", "b"], "columns": {"u": {}}}
        )
