"""Settings as they are typed: names stay text, and every slip has its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import compose_quickly
from lines import pairs
from omegaconf import OmegaConf, open_dict

from fedsim.config.check import validate
from fedsim.config.compose import compose
from fedsim.config.keys import refusal
from fedsim.config.parts import check_types, part
from fedsim.config.words import last_of_each, readable, refuse_empty, refuse_twice
from fedsim.errors import ConfigError


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(compose(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is kept as it was typed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "1e5",
        "007",
        "3.10",
        "true",
        "False",
        "1_000",
        "nan",
        "-5",
        "0x10",
        "Übung",
        "a b",
        "a=b",
        "x;y",
        "2024",
    ],
)
def test_a_name_is_text(name: str) -> None:
    config = compose([f"name={name}", f"method={name}"])
    validate(config)
    assert (config.name, config.method) == (name, name)
    assert OmegaConf.create(OmegaConf.to_yaml(config)).name == name, "read back from a run folder"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("name=a,1e5,007", "name=a,'1e5','007'"),
        ("name='1e5'", "name='1e5'"),
        ("client.lr=1e5", "client.lr=1e5"),
        ("tags=[1e5,x]", "tags=[1e5,x]"),
        ("data.path=~/x", f"data.path={Path.home()}/x"),
        ("dir=/a/lr=0.1", "dir='/a/lr=0.1'"),
        ("data.domains=[ü]", "data.domains=[ü]"),
        ("++name=1e5", "++name='1e5'"),
        ("~model", "~model"),
        ("seed=range(3)", "seed=range(3)"),
    ],
)
def test_what_hydra_reads(typed: str, read: str) -> None:
    assert readable([typed]) == [read]


# -- slips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "line"), pairs(Path(__file__).with_name("slips.txt")))
def test_a_slip_has_its_line(overrides: str, line: str) -> None:
    assert refused(*overrides.split()) == line


@pytest.mark.parametrize(
    "override", ["seed=range(0)", "seed=range(5,0)", "seed=range(0,5,0)", "client.lr=range(0.5,0.1)"]
)
def test_an_empty_sweep_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="holds no value; seed=range"):
        refuse_empty(["rounds=2", override])
    refuse_empty(["seed=range(3)", "seed=range(3,0,-1)", "client.lr=range(0.1,0.5,0.1)"])


@pytest.mark.parametrize("text", ["a: [1\n", "a: 1\n\tb: 2\n"])
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy/mine.yaml").write_text(text)
    line = refused(f"hydra.searchpath=[file://{tmp_path}]", "strategy=mine")
    assert line.startswith(f"{tmp_path}/strategy/mine.yaml, line 2: no valid YAML (")


# -- names that cannot be folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (f"name={'n' * 300}", "name: too long for a folder (300 bytes; at most 255)"),
        (f"name={'é' * 140}", "name: too long for a folder (280 bytes; at most 255)"),
        (f"method={'m' * 200}", "method: too long for a folder (200 bytes; at most 195)"),
        (f"dir=a/{'d' * 256}/b", "dir: too long for a folder (256 bytes; at most 255)"),
        ("name=..", "name=..: names a folder within `out`; another place is out=PATH or dir=PATH"),
        (
            "name=a/../../b",
            "name=a/../../b: names a folder within `out`; another place is out=PATH or dir=PATH",
        ),
        ("name=/tmp/x", "name=/tmp/x: names a folder within `out`; another place is out=PATH or dir=PATH"),
        ("name=.x", "name=.x: must not begin with '.' or '~', which fedsim report and shells pass over"),
        ("name=~", "name=~: must not begin with '.' or '~', which fedsim report and shells pass over"),
        ("method=a/b", "method=a/b: must be a plain label, without '/', '.' or '~' before it"),
        ("dir=''", "dir='': must not be empty"),
    ],
)
def test_a_name_that_can_be_no_folder(override: str, line: str) -> None:
    assert refused(override) == line


def test_a_name_may_lie_deeper() -> None:
    validate(compose_quickly(["name=paper/table1"]))


# -- values of parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "override", "line"),
    [
        ("strategy", "strategy.server_lr=abc", "strategy.server_lr=abc: must be a finite number"),
        ("strategy", "strategy.server_lr=inf", "strategy.server_lr=inf: must be a finite number"),
        ("strategy", "strategy.server_lr=null", "strategy.server_lr=null: must be a finite number"),
        ("strategy", "strategy.server_lr=true", "strategy.server_lr=True: must be a finite number"),
        ("strategy", "strategy.weighting=3", "strategy.weighting=3: must be text"),
        ("model", "model.hidden=abc", "model.hidden=abc: must be a list, each a whole number"),
        ("model", "model.hidden=[2.5]", "model.hidden=[2.5]: must be a list, each a whole number"),
        ("model", "model.batch_norm=1", "model.batch_norm=1: must be true or false"),
        ("data", "data.subset=1.5", "data.subset=1.5: must be a whole number, or null"),
        ("partition", "partition.min_samples=1.5", "partition.min_samples=1.5: must be a whole number"),
    ],
)
def test_an_option_of_another_type_is_named(group: str, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_types(compose_quickly([override])[group], group)
    assert str(caught.value) == line


def test_types_are_told_at_any_depth() -> None:
    config = compose_quickly(["strategy=ggeur", "strategy.base.server_lr=x"])
    with pytest.raises(ConfigError, match=r"^strategy.base.server_lr=x: must be a finite number$"):
        part(config.strategy, "strategy")


class Theirs:
    """A user's part, whose types are its own affair."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


def test_parts_of_users_are_not_judged() -> None:
    node = OmegaConf.create({"_target_": f"{__name__}.Theirs", "rate": "fast"})
    assert part(node, "strategy").rate == "fast"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "client.lr_decay=5",
            "client.lr_decay=5.0: must be in (0, 1]: it multiplies the rate after each round",
        ),
        (
            "client.lr_decay=0",
            "client.lr_decay=0.0: must be in (0, 1]: it multiplies the rate after each round",
        ),
        ("model.hidden=[0]", "model.hidden=0: must be at least 1"),
        ("partition.min_samples=-1", "partition.min_samples=-1: must not be negative"),
        ("partition.per_class=-1", "partition.per_class=-1: must not be negative"),
    ],
)
def test_a_value_out_of_range(override: str, line: str) -> None:
    assert refused(override) == line


def test_ranges_of_parts_hold_for_fedsims_own() -> None:
    config = compose_quickly([])
    with open_dict(config):
        config.data = {"_target_": "math.floor", "alpha": "my own", "seed": -1}
    validate(config)


def test_a_key_with_two_values_is_refused_by_name() -> None:
    said = "strategy=a and strategy=b: one setting typed twice; type one of them"
    with pytest.raises(ConfigError, match=f"^{said}, or strategy=a,b -m for a run of each$"):
        refuse_twice(["rounds=1", "strategy=a", "strategy=b"], "-m for a run of each")
    with pytest.raises(ConfigError, match=r"seed=0 and \+seed=1: one setting typed twice; type one of them$"):
        refuse_twice(["seed=0", "+seed=1"])
    fine = ["strategy=a", "strategy.base=b", "data@x=a", "data=a", "seed=1", "seed=1", "~model", "model=mlp"]
    refuse_twice(fine)
    assert last_of_each(["-m", *fine, "+seed=2"]) == ["-m", *fine[:4], "+seed=2", *fine[6:]]


def test_a_setting_that_only_some_methods_of_a_sweep_have_is_given_to_those() -> None:
    said = refusal("strategy.mu", ["strategy=fedavg,fedprox", "strategy.mu=0.5"])
    assert said.startswith(
        "strategy.mu=0.5: fedavg has no mu, and a sweep gives a setting to all; type two commands"
    )
    assert "-m strategy=fedprox strategy.mu=0.5 and then -m strategy=fedavg without it" in said
    assert refusal("strategy.zzz", ["strategy=fedavg,fedprox"]).startswith("unknown key 'strategy.zzz'")
