"""Contracts make hundreds of tiny runs: compose each configuration once."""

from __future__ import annotations

import pytest
from problems import compose_quickly


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.api.compose", compose_quickly)
