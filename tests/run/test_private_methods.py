"""Which methods go with privacy: the table of docs/privacy.md, against what the settings refuse; and other refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from omegaconf import DictConfig

from clients.scaffold import ScaffoldClient
from clients.sgd import SGDClient
from fedsim.errors import ConfigError
from fedsim.run.participants import strategy
from fedsim.run.sound import check_privacy

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("client", "local", "record")
NEEDS = {
    **{name: ["system=lognormal"] for name in ("fedasync", "fedbuff")},
    **{name: ["topology=ring"] for name in ("gossip", "gossip_fedavg", "gossip_async", "dpsgd")},
    **{name: ["strategy.lr=0.05"] for name in ("one_byte", "decomfl", "fedkseed", "mezo")},
    "fedsgd": ["client.steps=1"],
    "ranked_lora": ["strategy.ranks=[1]"],
}
BASE = ["engine=serial", "client.steps=3"]
PRIVATE = ["privacy.z=1", "privacy.delta=1e-3"]


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


def settings(name: str, *more: str) -> DictConfig:
    config = compose_quickly([*BASE, f"strategy={name}", *NEEDS.get(name, []), *more])
    for node in (config.strategy, config.strategy.get("base")):
        if node is not None and "weighting" in node and not any("weighting" in one for one in more):
            node.weighting = "uniform"
    return config


def check(config: DictConfig) -> None:
    check_privacy(strategy(config, None), config, given_cohorts=False)


def test_the_table_knows_every_method() -> None:
    assert set(table()) == {path.stem for path in (ROOT / "conf/strategy").glob("*.yaml")}


@pytest.mark.slow
def test_every_method_is_let_through_or_refused_as_the_table_says() -> None:
    wrong = {}
    groups = {level: settings("fedavg", f"privacy={level}", *PRIVATE).privacy for level in LEVELS}
    for name, verdicts in table().items():
        config = settings(name)
        for level in LEVELS:
            config.privacy = groups[level]
            try:
                check(config)
                found = True
            except ConfigError as error:
                found, why = False, str(error)
            if found != verdicts[level]:
                wrong[name, level] = "let through" if found else why
    assert not wrong


def test_a_rule_of_ones_own_says_how_it_looks_at_samples() -> None:
    """A subclass that changes anything of the rule is refused under ``record`` until it says so itself."""

    def step(self: Any, *args: Any) -> None:
        return None

    private = settings("fedavg", "privacy=record", *PRIVATE)
    for name in ("prepare", "begin", "step", "finish", "fit"):
        changed = type("Changed", (SGDClient,), {name: step})
        method = strategy(private, None)
        method.client = changed(weighting="uniform")
        with pytest.raises(ConfigError, match=r"or do not say .* of your own \(Changed\) .*grad_only = True"):
            check_privacy(method, private, given_cohorts=False)
        method.client = type("Says", (changed,), {"grad_only": True})(weighting="uniform")
        check_privacy(method, private, given_cohorts=False)
        assert not type(
            "Again", (type("Says", (changed,), {"grad_only": True}),), {name: lambda *a: 1}
        ).grad_only
    for harmless in ("keeps", "evaluate", "own_weights"):
        assert type("Measured", (SGDClient,), {harmless: step}).grad_only
    assert not type("Second", (ScaffoldClient,), {"finish": step}).grad_only


@pytest.mark.parametrize(
    ("name", "overrides", "why"),
    [
        (
            "fedavg",
            ["strategy.weighting=samples"],
            "strategy.weighting=samples.*type strategy.weighting=uniform",
        ),
        ("fedavg", ["aggregator=coordinate_median"], "needs the mean"),
        ("fedavg", ["aggregator.before=[{nnm: {f: 1}}]"], "needs the mean.*mean after aggregator.before"),
        ("fedavg", ["sampling=oort"], "sampling=Oort: who is asked"),
        ("fedavg", ["sampling=weighted"], "sampling=Weighted"),
        (
            "fedavg",
            ["system=phones", "system.over_selection=1.5"],
            "over_selection=1.5",
        ),
        ("fedavg", ["privacy=local", "sampling=oort"], "sampling=Oort: clients are chosen by losses"),
        (
            "fedavg",
            ["privacy=record", "sampling=power_of_choice"],
            "by losses on their samples.*sampling=uniform",
        ),
        (
            "fedavg",
            ["privacy=record", "+data.contract={normalize: agreed}"],
            "sums and squares of their samples",
        ),
        ("fedavg", ["privacy=local", "+data.contract={normalize: agreed}"], "give constants"),
        ("scaffold", ["privacy.clips={d: 1}"], "clips.d: Scaffold sends no vector 'd'; it sends delta, c"),
        ("fedavg", ["privacy=record", "privacy.clips={delta: 1}"], "gradients of samples are clipped"),
        ("fedavg", ["privacy.cap=4"], "add participation=bernoulli"),
        ("fedavg", ["privacy.mechanism=banded"], "type sampling=round_robin"),
        (
            "fedavg",
            ["privacy.mechanism=banded", "sampling=round_robin", "exclude=[1]", "clients_per_round=1"],
            "type exclude_fill=shrink",
        ),
        ("fedavg", ["privacy.epsilon_max=0.01"], "would need privacy.z="),
        ("fedavg", ["pretrain=central"], "outside the budget"),
        ("fednova", ["client.steps=null"], "'?work'? in plain.*client.steps"),
        ("scaffold", ["privacy=record", "strategy.option=1"], "by more than the gradient"),
        ("logit_adjust", ["strategy.prior=all"], "type strategy.prior=client"),
    ],
)
def test_settings_that_are_refused(name: str, overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        more = [] if any(one.startswith("privacy=") for one in overrides) else ["privacy=client"]
        check(settings(name, *more, *PRIVATE, *overrides))
