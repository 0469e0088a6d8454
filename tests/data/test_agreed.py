"""Columns and classes as agreed, values that are not, and statistics that do not depend on who holds what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsim
from fedsim.config.compose import compose
from fedsim.data.agreed import Contract
from fedsim.data.columns import Column, ContractError
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.moments import Moments
from fedsim.data.own_tables import table
from fedsim.data.tabular import tensors
from fedsim.errors import ConfigError
from fedsim.run import samples

COLUMNS = {
    "age": {"type": "integer", "unit": "years", "range": [0, 120]},
    "sex": {"categories": ["f", "m"]},
    "chol": {"unit": "mg/dl", "range": [80, 600], "missing": 220},
}
CONTRACT = {"classes": ["healthy", "ill"], "columns": COLUMNS}
HEAD = "chol,age,sex,target"
ROWS = ("240,61,f,ill", ",35,m,healthy", "199.5,70,m,ill")


def written(folder: Path, *rows: str, head: str = HEAD) -> Path:
    path = folder / "own.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def faults(path: Path, contract: Mapping[str, Any] = CONTRACT, **options: Any) -> list[str]:
    with pytest.raises(ContractError) as refused:
        table(path, target="target", contract=contract, **options)
    return str(refused.value).splitlines()


def test_a_table_has_the_agreed_columns_in_their_order(tmp_path: Path) -> None:
    data = table(written(tmp_path, *ROWS), target="target", contract=CONTRACT)
    assert data.columns == ("age", "sex=f", "sex=m", "chol")
    assert data.train.x.tolist() == [[61, 1, 0, 240], [35, 0, 1, 220], [70, 0, 1, 199.5]]
    assert data.train.y.tolist() == [1, 0, 1] and data.classes == ("healthy", "ill")


def test_parquet_and_csv_are_read_alike(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    csv = table(written(tmp_path, *ROWS), target="target", contract=CONTRACT)
    held = {"chol": [240, None, 199.5], "age": [61, 35, 70], "sex": ["f", "m", "m"]}
    whole = pa.table({**held, "target": ["ill", "healthy", "ill"]})
    pq.write_table(whole, tmp_path / "own.parquet")
    same = table(tmp_path / "own.parquet", target="target", contract=CONTRACT)
    assert torch.equal(csv.train.x, same.train.x) and torch.equal(csv.train.y, same.train.y)
    text = pa.table({**held, "age": ["61", "35", "70"], "target": ["ill"] * 3})
    pq.write_table(text, tmp_path / "own.parquet")
    assert faults(tmp_path / "own.parquet")[0].startswith(
        "column 'age' in years: 3 of 3 values are no numbers, e.g. in row 1"
    )


def test_everything_that_is_wrong_with_a_table_is_said_at_once_and_no_value(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "5.1,777,f,ill",
        "5.3,33.5,x,dead",
        "6.2,,m,healthy",
        "4.8,forty,m,ill",
        head="chol,age,sex,target",
    )
    found = faults(path)
    assert [line.split(";")[0] for line in found] == [
        "column 'age' in years: 1 of 4 values are no numbers, e.g. in row 4",
        "column 'age' in years: 1 of 4 values are empty, e.g. in row 3",
        "column 'age' in years: 1 of 4 values are no whole numbers, e.g. in row 2",
        "column 'age' in years: 1 of 4 values are outside 0 to 120, e.g. in row 1",
        "column 'sex': 1 of 4 values are none of f, m, e.g. in row 2",
        "column 'chol' in mg/dl: 4 of 4 values are outside 80 to 600, e.g. in row 1",
        "target 'target': 1 of 4, e.g. in row 2, name none of the classes agreed (healthy, ill)",
    ]
    assert "is the unit another than mg/dl" in found[5]
    for value in ("777", "33.5", "forty", "dead", "5.1", " x"):
        assert value not in " ".join(found), value


def test_missing_and_extra_columns_are_named(tmp_path: Path) -> None:
    found = faults(written(tmp_path, "240,61,7,ill", head="chole,age,room,target"))
    assert [line.split(":")[0] for line in found] == [
        "column 'sex'",
        "column 'chol'",
        "column 'chole'",
        "column 'room'",
    ]
    assert "nearest is 'chole'" in found[1]
    path = written(tmp_path, "9,240,61,f,ill", head="id,chol,age,sex,target")
    assert len(table(path, target="target", ignore=["id"], contract=CONTRACT).train) == 1


def test_what_may_be_a_row_of_values_is_not_told_as_names(tmp_path: Path) -> None:
    (found,) = faults(written(tmp_path, "240,61,f,ill", head="199.5,70,m,dead"))
    assert found == "columns: none of age, sex, chol, ... is there; does the first row name them?"
    many = ",".join(f"gene{k}" for k in range(50))
    found = faults(written(tmp_path, f"240,61,f,ill{',1' * 50}", head=f"chol,age,sex,target,{many}"))
    assert len(found) == 4 and found[3] == "columns: 47 others are not agreed; leave them out"
    names = tuple(f"patient{k}" for k in range(9))
    data = Dataset(Samples(torch.zeros(9, 1), torch.arange(9)), classes=names)
    with pytest.raises(ContractError) as refused:
        Contract(classes=("a", "b")).fitted(data)
    assert "6 others are none of those agreed; are these labels?" in str(refused.value)
    assert "patient3" not in str(refused.value)


def test_a_number_is_one_in_every_program(tmp_path: Path) -> None:
    (found,) = faults(written(tmp_path, "2_40,61,f,ill", "240,61,f,ill", head="chol,age,sex,target"))
    assert found.startswith("column 'chol' in mg/dl: 1 of 2 values are no numbers, e.g. in row 1")


def test_numbers_to_be_predicted_need_no_classes(tmp_path: Path) -> None:
    path = written(tmp_path, "240,61,f,1.5", "240,61,f,2")
    data = table(path, target="target", contract={"columns": COLUMNS})
    assert data.train.y.tolist() == [1.5, 2.0] and not data.classes


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"class": ["a"]}, "unknown key 'data.contract.class'; nearest is 'data.contract.classes'"),
        ({"classes": ["a", "a"]}, "each once"),
        ({"columns": {"age": {"units": "y"}}}, "nearest is 'data.contract.columns.age.unit'"),
        ({"columns": {"age": {"range": [3, 1]}}}, "expected [lowest, highest]"),
        ({"columns": {"age": {"range": [0, 9], "missing": 10}}}, "a value that the column itself may have"),
        ({"columns": {"_target_": {}}}, "does not begin with '_'"),
        ({"columns": {"sex": {"type": "category"}}}, "a category has them"),
        ({"image": {"mode": "CMYK"}}, "must be one of RGB, L"),
        ({"image": {"size": 0}}, "expected pixels, or [height, width]"),
        ({"normalize": "pooled"}, "expected agreed, or {mean"),
        ({"normalize": {"mean": ["x"]}}, "expected numbers"),
        ({"normalize": {"mean": [float("nan")]}}, "expected numbers"),
        ({"normalize": {"std": {"age": 0}}}, "normalize.std={'age': 0}: must be positive"),
        ({"columns": {"age": {"range": [float("nan"), 1]}}}, "expected [lowest, highest]"),
        ({"versions": {"numpy": 2}}, "unknown key 'data.contract.versions.numpy'"),
    ],
)
def test_a_contract_that_cannot_be_is_refused_by_key(node: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        Contract.of(node)


def test_labels_go_by_name() -> None:
    contract = Contract.of({"classes": ["a", "b", "c"]})
    assert contract is not None
    data = tensors(torch.ones(3, 2), np.array(["c", "a", "c"]))
    found = contract.fitted(data)
    assert found.train.y.tolist() == [2, 0, 2] and found.classes == ("a", "b", "c")
    other = tensors(torch.ones(3, 2), np.array(["c", "A", "A"]))
    with pytest.raises(
        ContractError, match=r"'A' \(2 samples, e.g. row 2 of the training samples\) is none of those agreed"
    ):
        contract.fitted(other)


def test_samples_that_are_not_finite_are_counted() -> None:
    x = torch.eye(4)
    x[2, 1] = float("nan")
    data = Dataset(Samples(x, torch.zeros(4, dtype=torch.int64)), classes=("a",))
    with pytest.raises(ContractError, match=r"training samples: 1 of 4 have NaN or infinity, e\.g\. row 3"):
        Contract(classes=("a",)).fitted(data)


def test_other_sources_are_held_to_the_columns_too() -> None:
    contract = Contract.of({"columns": {"a": {"range": [0, 1]}, "b": {}}})
    assert contract is not None
    x = torch.tensor([[5.0, 1.0], [7.0, 0.5], [float("nan"), 2.0]])
    swapped = Dataset(Samples(x, torch.zeros(3, dtype=torch.int64)), classes=("0",), columns=("b", "a"))
    with pytest.raises(ContractError) as refused:
        contract.fitted(swapped)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(
        "training samples: column 'a': 1 of 3 values are outside 0 to 1, e.g. in row 3"
    )
    assert lines[1].startswith("training samples: column 'b': 1 of 3 values are not finite, e.g. in row 3")
    good = Dataset(Samples(x[:2], torch.zeros(2, dtype=torch.int64)), classes=("0",), columns=("b", "a"))
    assert contract.fitted(good).train.x.tolist() == [[1, 5], [0.5, 7]]


def test_statistics_pool_exactly_whoever_holds_what() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(1e6, 1, (500, 3)) * np.array([1, 1e-9, 1e12]))
    rows = np.arange(500)
    whole = Moments.of(x, rows)
    cuts = np.split(rng.permutation(rows), [3, 100, 101, 400])
    parts = [Moments.read(Moments.of(x, part).text()) for part in cuts]
    assert sum(parts[1:], start=parts[0]) == whole
    norm, exact = whole.normalize(), x.numpy().astype(np.longdouble)
    assert np.allclose(norm.mean, exact.mean(0).astype(float), rtol=1e-12, atol=0)
    assert np.allclose(norm.std, exact.std(0).astype(float), rtol=1e-12, atol=0)
    small = Moments.of(x.float(), rows)
    assert np.allclose(small.normalize().mean, x.float().double().mean(0), rtol=1e-12, atol=0)


def test_statistics_of_images_are_those_of_their_channels() -> None:
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (20, 3, 5, 4)).astype(np.uint8))
    norm = Moments.of(x, np.arange(20)).normalize(255)
    exact = x.double() / 255
    assert np.allclose(norm.mean, exact.mean((0, 2, 3)), rtol=1e-12, atol=0)
    assert np.allclose(norm.std, exact.std((0, 2, 3), correction=0), rtol=1e-12, atol=0)
    same = Moments.of(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8), np.arange(4)).normalize(255)
    assert same.std == (1.0,)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[1, [], [1]]",
        '[2, ["3"], ["4"]]',
        '[1, ["1/0"], ["1"]]',
        '[1, ["1e9"], ["1"]]',
        '["1", [], []]',
    ],
)
def test_statistics_that_no_values_have_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Moments.read(text)


def test_a_simulation_normalises_by_what_its_clients_train_on(tmp_path: Path) -> None:
    """Excluded clients' samples, and those held out, have no say."""
    rng = np.random.default_rng(0)
    rows = [
        f"{rng.normal(240, 30):.1f},{rng.integers(20, 90)},{'fm'[k % 2]},{('ill', 'healthy')[k % 3 == 0]}"
        for k in range(60)
    ]
    (tmp_path / "train.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    (tmp_path / "test.csv").write_text("\n".join([HEAD, *rows[:9]]) + "\n")
    whole = table(tmp_path, target="target", contract=CONTRACT).train
    text = (
        "{classes: [healthy, ill], normalize: agreed, columns: {age: {type: integer}, sex: {categories: [f, m]}, "
        "chol: {missing: 220}}}"
    )
    settings = [
        *("num_clients=3", "clients_per_round=2", "rounds=1", "model=linear", "engine=serial"),
        *("tracker=quiet", "data=table", f"data.path={tmp_path}", f"data.contract={text}", "exclude=[1]"),
        *("partition=iid", f"dir={tmp_path / 'run'}"),
    ]
    config = compose(settings)
    found = samples.split(config, samples.dataset(config))
    norm = found.dataset.normalize
    used = whole.x[torch.from_numpy(found.shards.index)]
    assert norm is not None and len(used) == 40
    assert np.allclose(norm.mean, used.mean(0), rtol=1e-12) and np.allclose(
        norm.std, used.std(0, correction=0), rtol=1e-12
    )
    assert fedsim.simulate(settings).rows


def test_a_column_says_what_it_becomes() -> None:
    assert Column.of("sex", {"categories": ["f", "m"]}, "k").features == ("sex=f", "sex=m")
    assert Column.of("n", None, "k").features == ("n",)
