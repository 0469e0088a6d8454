"""Detection sets in COCO's format: boxes in resized images, classes, domains, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsim.data.agreed import Contract
from fedsim.data.columns import ContractError
from fedsim.data.sources import coco
from fedsim.errors import DataError

OPTIONS: dict[str, Any] = {
    "train": "annotations/train.json",
    "test": None,
    "images": None,
    "size": 32,
    "domain": None,
    "domains": None,
}


def laid(root: Path, **changes: Any) -> Path:
    """Two images, 64x32 and 16x16, the second first by name; categories 7 and 3."""
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    for name, shape in (("b.png", (32, 64, 3)), ("a.png", (16, 16, 3))):
        Image.fromarray(np.full(shape, 200, np.uint8)).save(root / "train" / name)
    content = {
        "images": [
            {"id": 9, "file_name": "a.png", "width": 16, "height": 16, "attributes": {"weather": "rainy"}},
            {"id": 4, "file_name": "b.png", "width": 64, "height": 32, "weather": "clear"},
        ],
        "annotations": [
            {"image_id": 4, "category_id": 7, "bbox": [8, 8, 16, 4]},
            {"image_id": 4, "category_id": 3, "bbox": [0, 0, 64, 32]},
            {"image_id": 4, "category_id": 3, "bbox": [0, 0, 64, 32], "iscrowd": 1},
            {"image_id": 9, "category_id": 3, "bbox": [4, 4, 8, 8]},
            {"image_id": 9, "category_id": 3, "bbox": [4, 4, 0, 8]},
        ],
        "categories": [{"id": 7, "name": "car"}, {"id": 3, "name": "bus"}],
    } | changes
    (root / "annotations/train.json").write_text(json.dumps(content))
    return root


def test_boxes_are_those_of_the_resized_images(tmp_path: Path) -> None:
    data = coco(laid(tmp_path), **OPTIONS)
    assert data.classes == ("bus", "car") and data.train.x.shape == (2, 3, 32, 32)
    assert data.train.y["labels"].tolist() == [[1, 0], [0, -1]]
    assert data.train.y["boxes"].tolist() == [[[4, 8, 12, 12], [0, 0, 32, 32]], [[8, 8, 24, 24], [0] * 4]]
    assert data.test is None and not data.domains


def test_domains_by_a_key_of_the_images(tmp_path: Path) -> None:
    data = coco(laid(tmp_path), **{**OPTIONS, "domain": "weather"})
    assert data.domains == ("clear", "rainy") and data.domain("train").tolist() == [0, 1]
    one = coco(tmp_path, **{**OPTIONS, "domain": "weather", "domains": ["rainy"]})
    assert len(one.train) == 1 and one.domains == ("rainy",)
    two = coco(
        tmp_path, **{**OPTIONS, "domain": "weather", "train_domains": ["rainy"], "test": OPTIONS["train"]}
    )
    assert len(two.train) == 1 and len(two.test) == 2 and two.domain("train").tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"path": None}, "data.path=null"),
        ({}, {"size": 2}, "data.size=2"),
        ({}, {"images": "elsewhere"}, "'b.png' is in none of .*elsewhere; type data.images"),
        ({}, {"test": "annotations/val.json"}, "val.json does not exist"),
        ({}, {"domain": "hour"}, "image 4 has no 'hour'"),
        ({}, {"domains": ["clear"]}, "Type data.domain="),
        ({}, {"domain": "weather", "train_domains": ["foggy"]}, "'foggy' is none of clear, rainy"),
        ({}, {"domain": "weather", "domains": ["foggy"]}, "no image is of the domains foggy"),
        ({"categories": 3}, {}, "has no list 'categories'"),
        (
            {"annotations": [{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1]}]},
            {},
            "annotation 0 is of image 1",
        ),
        ({"annotations": [{"image_id": 4, "category_id": 3}]}, {}, "annotation 0 needs image_id"),
        (
            {"annotations": [{"image_id": 4, "category_id": 3, "bbox": [0, "a", 1, 1]}]},
            {},
            "could not convert string to float: 'a'",
        ),
        (
            {"annotations": [{"image_id": 4, "category_id": 3, "bbox": [float("nan"), 0, 1, 1]}]},
            {},
            "annotation 0 needs .*its bbox is not finite",
        ),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    path = laid(tmp_path, **changes)
    given = {"path": path, **OPTIONS, **options}
    with pytest.raises(DataError, match=words):
        coco(given.pop("path"), **given)


def test_categories_go_by_the_contracts_names_and_images_by_its_mode(tmp_path: Path) -> None:
    agreed = {"classes": ["car", "tram", "bus"], "image": {"mode": "RGB"}}
    root = laid(tmp_path)
    (root / "annotations/train.json").rename(root / "train/own.json")
    data = Contract.of(agreed).fitted(coco(root / "train/own.json", **OPTIONS, contract=agreed))  # one file
    assert data.classes == ("car", "tram", "bus") and data.test is None
    assert data.train.y["labels"].tolist() == [[0, 2], [2, -1]]
    with pytest.raises(
        ContractError, match=r"'car' \(1 samples, e.g. row 1 of the training samples\) is none"
    ):
        Contract.of({"classes": ["bus", "bike"]}).fitted(data_of(root))
    with pytest.raises(ContractError, match=r"2 of 2 are in colours, e\.g\. image 1; agreed is L"):
        coco(root / "train/own.json", **OPTIONS, contract={"image": {"mode": "L"}})
    for name in ("a.png", "b.png"):
        Image.open(root / "train" / name).convert("L").save(root / "train" / name)
    assert coco(root / "train/own.json", **OPTIONS, contract={"image": {"mode": "L"}}).input_shape[0] == 1
    with pytest.raises(ContractError, match="2 of 2 are grey"):
        coco(root / "train/own.json", **OPTIONS, contract=agreed)


def data_of(root: Path) -> Any:
    return coco(root / "train/own.json", **OPTIONS)
