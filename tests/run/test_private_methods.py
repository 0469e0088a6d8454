"""Which methods go with privacy: the table of docs/privacy.md, against what the settings refuse; and other refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from composing import compose_quickly

from fedsim.errors import ConfigError
from fedsim.run.participants import strategy
from fedsim.run.sound import check_privacy

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("client", "local", "record")
NEEDS = {
    **{name: ["system=lognormal"] for name in ("fedasync", "fedbuff")},
    **{name: ["topology=ring"] for name in ("gossip", "gossip_fedavg", "gossip_async", "dpsgd")},
    "fedsgd": ["client.steps=1"],
}
BASE = ["engine=serial", "privacy.z=1", "privacy.delta=1e-3", "client.steps=3"]


def table() -> dict[str, dict[str, bool]]:
    """Verdict by method and level."""
    text = (ROOT / "docs/privacy.md").read_text().partition("## Methods")[2]
    found: dict[str, dict[str, bool]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and "`" in cells[0]:
            for name in re.findall(r"`(\w+)`", cells[0]):
                found[name] = {level: cell == "yes" for level, cell in zip(LEVELS, cells[2:], strict=True)}
    return found


def check(name: str, level: str, *more: str) -> None:
    config = compose_quickly([*BASE, f"strategy={name}", f"privacy={level}", *NEEDS.get(name, []), *more])
    for node in (config.strategy, config.strategy.get("base")):
        if node is not None and "weighting" in node and not more:
            node.weighting = "uniform"
    check_privacy(strategy(config, None), config, given_cohorts=False)


def test_the_table_knows_every_method() -> None:
    assert set(table()) == {path.stem for path in (ROOT / "conf/strategy").glob("*.yaml")}


@pytest.mark.parametrize("level", LEVELS)
def test_every_method_is_let_through_or_refused_as_the_table_says(level: str) -> None:
    wrong = {}
    for name, verdicts in table().items():
        try:
            check(name, level)
        except ConfigError as error:
            if verdicts[level]:
                wrong[name] = str(error)
        else:
            if not verdicts[level]:
                wrong[name] = "let through"
    assert not wrong


@pytest.mark.parametrize(
    ("name", "overrides", "why"),
    [
        (
            "fedavg",
            ["strategy.weighting=samples"],
            "strategy.weighting=samples.*type strategy.weighting=uniform",
        ),
        ("fedavg", ["strategy.weighting=uniform", "aggregator=coordinate_median"], "needs the mean"),
        ("fedavg", ["strategy.weighting=uniform", "sampling=oort"], "sampling=Oort: who is asked"),
        ("fedavg", ["strategy.weighting=uniform", "sampling=weighted"], "sampling=Weighted"),
        (
            "fedavg",
            ["strategy.weighting=uniform", "system=phones", "system.over_selection=1.5"],
            "over_selection=1.5",
        ),
        ("fedavg", ["strategy.weighting=uniform", "privacy.cap=4"], "add participation=bernoulli"),
        ("fedavg", ["strategy.weighting=uniform", "privacy.mechanism=banded"], "type sampling=round_robin"),
        ("fedavg", ["strategy.weighting=uniform", "privacy.epsilon_max=0.01"], "would need privacy.z="),
        ("fedavg", ["strategy.weighting=uniform", "pretrain=central"], "outside the budget"),
        ("fednova", ["strategy.weighting=uniform", "client.steps=null"], "'?work'? in plain.*client.steps"),
        ("scaffold", ["privacy=record", "strategy.option=1"], "by more than the gradient"),
        ("logit_adjust", ["strategy.weighting=uniform", "strategy.prior=all"], "type strategy.prior=client"),
    ],
)
def test_settings_that_are_refused(name: str, overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check(name, "client", *overrides)
