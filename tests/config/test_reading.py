"""What is kept between configurations changes none of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from omegaconf import OmegaConf, open_dict

from fedsim.config import reading
from fedsim.config.compose import compose
from fedsim.config.reading import composed
from fedsim.config.tree import config_loader
from fedsim.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
METHODS = [f"strategy={p.stem}" for p in sorted((CONF / "strategy").glob("*.yaml"))]
EXPERIMENTS = [f"experiment={p.stem}" for p in sorted((CONF / "experiment").glob("*.yaml"))]
WORDS = (
    ["rounds=3", "seed=7", "client.lr=0.5", "name=a", "tags=[a,b]"],
    ["client=adam", "client.lr=0.5", "client.adam.beta1=0.8"],
    ["strategy=fedprox", "++strategy.mu=2", "engine=serial", "engine.chunks=2", "strategy.mu=3"],
    ["strategy=ggeur", "strategy@strategy.base=scaffold", "data=digits", "data.subset=30"],
    ["view@views.strong=affine", "views.strong.flip=0", "partition=dirichlet", "partition.alpha=0.1"],
    ["model=mlp", "model.hidden=[3,4]", "++model.head=layers", "~pretrain", "aggregator=krum"],
    ["client.groups={head.*: {lr: 2}}", "exclude=[1,2]", "system=lognormal", "system.deadline=3"],
)


def plainly(words: list[str]) -> tuple[Any, ...]:
    """As Hydra alone has it: everything that a configuration holds, flags and interpolations too."""
    with config_loader():
        config = hydra_compose("config", overrides=words, return_hydra_config=True)
    choice = reading.chosen_method(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return held(config), choice


def held(config: Any) -> tuple[Any, ...]:
    values = OmegaConf.to_container(config, resolve=False)
    return values, OmegaConf.is_struct(config), OmegaConf.get_type(config), OmegaConf.get_type(config.engine)


SINGLE = [[word] for word in (*METHODS, *EXPERIMENTS)]
RARELY = [pytest.param(w, marks=pytest.mark.nightly) for i, w in enumerate(SINGLE) if i % 8]


@pytest.mark.parametrize("words", [*SINGLE[::8], *RARELY, *WORDS], ids=" ".join)
def test_it_is_what_hydra_makes_of_the_words(words: list[str]) -> None:
    expected = plainly(words)
    for _ in range(2):
        config, choice = composed(words)
        assert (held(config), choice) == expected


def test_what_is_done_to_one_configuration_is_not_in_the_next() -> None:
    first = compose(["strategy=fedprox", "client.lr=0.3"])
    first.strategy.mu, first.client.lr, first.tags = 9.0, 9.0, ["x"]
    second = compose(["strategy=fedprox"])
    assert second.strategy.mu != 9.0 and second.client.lr not in (0.3, 9.0) and second.tags == []


def test_an_edited_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = reading._tree()
    assert len(before) > 100 and reading._tree() == before
    file = tmp_path / "a.yaml"
    file.write_text("x: 1")
    monkeypatch.setattr(reading, "CONF", tmp_path)
    first = reading._tree()
    os.utime(file, ns=(1, 1))
    assert reading._tree() != first


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["client.lrr=1"], "unknown key 'client.lrr'"),
        (["client.lr=fast"], "client.lr"),
        (["client.lr=1,2"], "1,2"),
        (["roundss=3"], "unknown key 'roundss'"),
        (["client.lr=[1"], "client.lr"),
    ],
)
def test_errors_are_those_of_before(words: list[str], said: str) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
            compose(words)
