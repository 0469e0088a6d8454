"""Contracts of one-shot methods: which are left out is said in ``once.py``; models of other runs are never taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from once import reason

from fedsim.run.uploadstore import UploadStore


@pytest.fixture(autouse=True)
def _one_shot(
    request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if why := reason(request.node.originalname, params):
        pytest.skip(why)

    places: dict[UploadStore, Path] = {}

    def place(store: UploadStore) -> Path:
        """A folder of each run's own: its clients train, whatever was found elsewhere."""
        if store not in places:
            places[store] = tmp_path_factory.mktemp("uploads")
        return places[store]

    monkeypatch.setattr(UploadStore, "_shared", property(place))
