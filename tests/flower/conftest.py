"""Local grids handle hundreds of messages: compose each configuration once, as a node's process does."""

from __future__ import annotations

import pytest
from composing import compose_quickly

OWN = "careless narrow twophase"  # modules of these tests that runs name, as a node's owner allows its own


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_ALLOW", OWN)


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.flower.options.compose", lambda o: compose_quickly(o))
    monkeypatch.setattr("fedsim.api.compose", compose_quickly)
