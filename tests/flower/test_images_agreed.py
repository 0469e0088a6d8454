"""Images of hospitals that are not like the others': named by client before round 1, or the server is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import deploy, node

from fedsim.errors import EngineError
from fedsim.flower import nodes as nodes_module

AGREED = "data.contract={classes: [a, b], image: {mode: L, size: 8}}"
SETTINGS = ("rounds=1", "clients_per_round=2", "client.steps=1", "data=image_folder", "data.mode=L")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    monkeypatch.setattr(nodes_module, "AGAIN", 0.1)


def images(folder: Path, side: int, dtype: Any = np.uint8) -> None:
    for k in range(4):
        (folder / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side), 9 * k).astype(dtype)).save(folder / "ab"[k % 2] / f"{k}.png")


@pytest.mark.parametrize(
    ("server", "own", "settings", "said"),
    [
        ((8,), (9,), (AGREED, "model=linear"), "client 1: images: 4 of 4 are of another size, e.g. image 1"),
        ((8,), (8, np.uint16), (AGREED, "model=linear"), "client 1: images: 4 of 4 are of more than 8 bits"),
        ((8,), (9,), ("model=resnet18",), r"client 1, node 11 .*: image: its data have \[1, 9, 9\], the server's"),
        ((9,), (8,), (AGREED, "model=linear"), "^the server's data: images: 4 of 4 are of another size"),
        ((8,), (8,), (AGREED, "model=linear", "data.mode=RGB"), "data.mode=RGB: data.contract.image.mode says L"),
    ],
    ids=["size", "depth", "size of any", "server", "mode"],
)  # fmt: skip
def test_who_is_not_as_agreed_is_named(
    server: tuple[Any, ...], own: tuple[Any, ...], settings: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    images(tmp_path / "server/test", *server)
    nodes = {}
    for k, kind in enumerate(((8,), own)):
        images(tmp_path / f"h{k}", *kind)
        nodes[10 + k] = node(tmp_path, k, **{"own-data": True, "data-path": str(tmp_path / f"h{k}")})
    with pytest.raises(EngineError, match=said):
        deploy(tmp_path, *SETTINGS, f"data.path={tmp_path / 'server'}", *settings, clients=2, nodes=nodes)
    assert not (tmp_path / "run/metrics.jsonl").exists()
