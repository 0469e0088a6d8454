"""Settings of local optimisers that cannot be, and rules that read gradients back from local steps."""

from __future__ import annotations

import pytest
from problems import classification, hashes

from fedsim.errors import ConfigError, FedsimError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "client.groups={haed.*: {lr: 2}}",
            "client.groups: 'haed.\\*' matches no parameter; parameters are 0.weight",
        ),
        ("client.groups={0.wieght: {lr: 2}}", "'0.wieght' matches no parameter; nearest is 0.weight"),
        ("client.groups={0.*: {lrr: 2}}", "client.groups.0.\\*: unknown key 'lrr'; nearest is 'lr'"),
        ("client.groups={0.*: {lr: -1}}", "client.groups.0.\\*.lr=-1: must be a multiple of client.lr"),
        ("client.groups={0.*: {frozen: 1}}", "must be true or false"),
        ("client.groups={0.*: {frozen: true, lr: 2}}", "what is frozen has no lr"),
        ("client.groups={*: {frozen: true}}", "nothing would be trained"),
        ("client.groups={0.*: 3}", "must be patterns of names with settings"),
        ("client.nesterov=true", "client.nesterov=true: needs momentum"),
        ("client.accumulate=0", "client.accumulate=0: must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run(override)


@pytest.mark.parametrize("name", ["scaffold", "fednova", "fedcm", "fedsgd"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("client=adamw", "use client=sgd instead of adam"),
        ("client.schedule=cosine", "leave client.schedule out"),
        ("client.groups={0.*: {lr: 2}}", "client.groups must not give '0.\\*' another lr"),
        ("client.nesterov=true", "leave client.nesterov out"),
        ("client.round_schedule={shape: linear, over: 1}", "give client.round_schedule a floor"),
    ],
)
def test_methods_that_read_gradients_back_refuse_what_is_none(name: str, override: str, message: str) -> None:
    settings = [f"strategy={name}", override, "client.steps=1", "rounds=2"]
    extra = ["client.momentum=0.5"] if "nesterov" in override else []
    option = ["strategy.option=2"] if name == "scaffold" else []
    with pytest.raises(FedsimError, match=message):
        classification().run(*settings, *extra, *option)


def test_what_leaves_gradients_as_they_are_goes() -> None:
    fine = (
        "client.groups={0.*: {frozen: true}, *.bias: {weight_decay: 0.1}}",
        "client.round_schedule=cosine",
    )
    run = classification().run("strategy=fedcm", *fine, "client.accumulate=2", "client.schedule=constant")
    assert len(hashes(run)) == 4
