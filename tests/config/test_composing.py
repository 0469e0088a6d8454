"""Quick composition, which all tests of runs rest on, is composition."""

from __future__ import annotations

import pytest
from composing import compose_quickly

from fedsim.config.compose import compose
from fedsim.errors import ConfigError


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=ggeur", "strategy@strategy.base=scaffold", "strategy.target=6", "dir=a b", "seed=1"],
        ["client.lr=1e-300", "system=lognormal", "system.dropout.during=0.2", "attack=alie", "attack.z=1.5"],
        ["experiment=digits_lt", "model=mlp", "model.hidden=[5,6]", "rounds=1", "rounds=2", "tags=[a,b]"],
    ],
)
def test_the_same_configuration(overrides: list[str]) -> None:
    assert compose_quickly(overrides) == compose(overrides)


@pytest.mark.parametrize("override", ["strategy.rhoo=1", "client.lr=abc", "seed=0,1", "client.lr=[1"])
def test_the_same_refusals(override: str) -> None:
    with pytest.raises(ConfigError) as slow:
        compose([override])
    with pytest.raises(ConfigError) as quick:
        compose_quickly([override])
    assert str(quick.value) == str(slow.value)
