"""Parts of users' own that cannot work, or would have no effect: named, instead of trained without."""

from __future__ import annotations

from typing import Any

import pytest
from problems import classification

from fedsim.errors import FedsimError


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (lambda x, generator: None, r"returned None, expected \d+ samples.*is there a return"),
        (lambda x, generator: x[:1], r"returned 1 samples, expected"),
    ],
)
def test_an_augmentation_that_returns_something_else_is_named(augment: Any, said: str) -> None:
    with pytest.raises(FedsimError, match=said):
        classification().run("rounds=1", augment=augment)
