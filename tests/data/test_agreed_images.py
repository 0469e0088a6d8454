"""Images are in the agreed mode and size, or said to be in another, by count."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.data.agreed import Contract
from fedsim.data.columns import ContractError
from fedsim.data.image_folders import image_folder
from fedsim.data.image_tables import parquet


def image(path: Path, mode: str, size: tuple[int, int]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 7 if mode == "L" else (1, 2, 3)).save(path)


def test_images_of_another_mode_or_size_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "scans"
    for k, (mode, size) in enumerate([("RGB", (8, 6)), ("L", (8, 6)), ("RGB", (5, 5))]):
        image(root / "b" / f"mueller_{k}.png", mode, size)
    contract = {"classes": ["a", "b"], "image": {"mode": "RGB", "size": [6, 8]}}
    with pytest.raises(ContractError) as refused:
        image_folder(root, contract=contract)
    text = str(refused.value)
    assert "images: 1 of 3 are grey, e.g. image 2; agreed is RGB: convert them" in text
    assert "images: 1 of 3 are of another size, e.g. image 3; agreed is 6x8" in text
    assert "mueller" not in text
    (root / "b/mueller_1.png").unlink()
    (root / "b/mueller_2.png").unlink()
    for k, (mode, ink) in enumerate({"RGBA": (1, 2, 3, 99), "CMYK": (1, 2, 3, 4), "RGB": (1, 2, 3)}.items()):
        Image.new(mode, (8, 6), ink).save(root / "b" / f"mueller_{k}.tiff")
    Image.new("RGBA", (8, 6), (1, 2, 3, 255)).save(root / "b/mueller_3.png")
    with pytest.raises(ContractError) as refused:
        image_folder(root, contract=contract)
    assert [line.split(", e.g.")[0] for line in str(refused.value).splitlines()] == [
        "images: 1 of 5 are see-through",
        "images: 1 of 5 are of other colours than red, green and blue",
    ]
    for path in root.rglob("mueller_*.tiff"):
        path.unlink()
    (root / "b/mueller_3.png").unlink()
    found = image_folder(root, contract=contract)
    agreed = Contract.of(contract)
    assert agreed is not None
    assert found.train.x.shape == (1, 3, 6, 8) and agreed.fitted(found).train.y.tolist() == [1]
    with pytest.raises(ContractError, match=r"shape \(3, 6, 8\) .* agreed is L, any size"):
        Contract(mode="L").fitted(found)


def test_images_in_parquet_are_held_to_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    image(tmp_path / "one.png", "L", (4, 4))
    file = tmp_path / "own.parquet"
    pq.write_table(pa.table({"image": [(tmp_path / "one.png").read_bytes()] * 2, "label": ["a", "b"]}), file)
    with pytest.raises(ContractError, match=r"images: 2 of 2 are grey, e\.g\. image 1"):
        parquet(file, image="image", label="label", contract={"image": {"mode": "RGB"}})
    grey = parquet(file, image="image", label="label", contract={"image": {"mode": "L"}})
    assert grey.train.x.shape == (2, 1, 4, 4)
