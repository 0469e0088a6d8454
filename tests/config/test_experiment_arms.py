"""What the scripts of ``experiments/`` select are settings that exist."""

from __future__ import annotations

import pytest
from composing import compose_quickly

from experiments.one_shot import methods


@pytest.mark.parametrize("setting", ["digits", "mixed", "fashion", "cifar10"])
def test_every_method_of_the_one_shot_field_composes_in_every_setting(setting: str) -> None:
    """LeNet and the networks of CIFAR-10 have no ``model.hidden`` to be taken out."""
    for words in methods(setting).values():
        assert compose_quickly([f"experiment=one_shot_{setting}", *words]).name == f"one_shot_{setting}"
