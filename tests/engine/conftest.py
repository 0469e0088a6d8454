"""What tests of the engines share."""

from __future__ import annotations

from typing import Any

import pytest

from fedsim.engine import vectorised


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The clients of each chunk that were trained vectorised; empty for a chunk that failed."""
    seen: list[set[int]] = []

    def train(*arguments: Any) -> dict[int, vectorised.Trained]:
        seen.append(set())
        done = vectorised_train(*arguments)
        seen[-1] |= done.keys()
        return done

    vectorised_train = vectorised.train
    monkeypatch.setattr(vectorised, "train", train)
    return seen
