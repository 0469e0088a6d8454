"""Settings that nothing reads are said, with what would make them count."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from lines import pairs
from problems import classification

import strategies
from fedsim.run.unread import refuse_contradictions, say, typed_keys, without_effect

FLEET = "system=lognormal"


@pytest.mark.parametrize(("overrides", "line"), pairs(Path(__file__).with_name("unread.txt")))
def test_what_nothing_reads_is_said(overrides: str, line: str) -> None:
    typed = overrides.split()
    assert next(iter(without_effect(compose_quickly(typed), typed_keys(typed)))) == line


@pytest.mark.parametrize(
    "overrides",
    [
        "client.clip=loss client.clip_norm=1",
        f"strategy=fedbuff {FLEET} strategy.staleness=hinge strategy.b=3",
        f"strategy=fedbuff {FLEET} sampling=weighted",
        "clients_per_round=3 participation=bernoulli",
        "strategy=fedadam strategy.beta2=0.5 strategy.tau=1",
        "strategy._target_=nowhere.Method clients_per_round=3",
        "strategy=gossip topology=ring strategy.fanout=1 strategy.direction=pull",
        "privacy=client privacy.clip=adaptive privacy.adaptive.rate=0.5",
        "privacy=record privacy.micro=8 secagg=ring secagg.reach=5",
    ],
)
def test_what_counts_is_not_spoken_of(overrides: str) -> None:
    typed = overrides.split()
    assert not list(without_effect(compose_quickly(typed), typed_keys(typed)))


def test_simulate_says_it_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        classification().run("rounds=1", "client.steps=1", "client.clip=loss")
    said = [r.getMessage() for r in caplog.records]
    assert said[0].startswith(
        "client.epochs=2: without effect, since client.steps=1 says how long clients train"
    )
    assert said[1:] == ["client.clip=loss: without effect; add client.clip_norm=10"]


def test_steps_of_an_experiment_beside_typed_epochs_are_said(caplog: pytest.LogCaptureFixture) -> None:
    typed = ["experiment=gossip_async", "client.epochs=3"]
    refuse_contradictions(compose_quickly(typed), typed)
    with caplog.at_level(logging.WARNING):
        say(compose_quickly(typed), typed)
    assert caplog.records[0].getMessage().startswith("client.epochs=3: without effect, since client.steps=1")
    both = [*typed, "client.steps=2"]
    with pytest.raises(Exception, match=r"^client.epochs=3: without effect, since client.steps=2"):
        refuse_contradictions(compose_quickly(both), both)
    refuse_contradictions(compose_quickly([*typed, "client.steps=null"]), [*typed, "client.steps=null"])


def test_what_a_class_says_it_does_not_read_are_options_of_it() -> None:
    checked = 0
    for module in pkgutil.iter_modules(strategies.__path__, "strategies."):
        for kind in vars(importlib.import_module(module.name)).values():
            traits: Any = getattr(kind, "traits", None)
            if inspect.isclass(kind) and traits is not None and kind.__module__ == module.name:
                options = set(inspect.get_annotations(kind)) | {
                    k for c in kind.__mro__ for k in inspect.get_annotations(c)
                }
                named = {name for option, (other, _) in traits.unread.items() for name in (option, other)}
                assert named <= options, kind
                checked += bool(named)
    assert checked >= 8
