"""What methods say of themselves, and that nothing else is asked to find out."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
from composing import compose_quickly
from problems import classification, method

import strategies
from clients.base import Client
from fedsim.errors import ConfigError
from fedsim.local.interface import ClientLike
from fedsim.run import participants
from fedsim.server.traits import StrategyLike, Traits, missing
from strategies.base import Strategy
from strategies.fedavg import FedAvg
from strategies.semisupervised import OF_SOME

ROOT = Path(__file__).parents[2]
NAMES = {f.name for f in fields(Traits)}
SEMI = {"labels": True, "labelled": "any", "unlabelled": True, "metrics": OF_SOME}
LINEAR = {"features": True, "linear_head": True}
HEAD = LINEAR | {"body": True}

ASKS_ALL = {"everybody": True, "disjoint": True, "labels": True}
ONCE = ASKS_ALL | {"uploads": "auto", "buffers": "average", "architectures": True, "logits": True}
SLOPES = {"buffers": "average", "metrics": frozenset({"saturated", "nonfinite_slopes"})}
OWN_BASE = {"changes_base": True, "buffers": "server"}

# Of every class: what differs from the defaults. All others keep them all.
EXPECTED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ExactAverage", "FedEx", "FLoRA"), OWN_BASE),
    **dict.fromkeys(("FedMatch", "FixMatch", "SemiSupervised", "ServerTrains", "UDA"), SEMI),
    **dict.fromkeys(("DeComFL", "FedKSeed", "Logged", "Slopes"), SLOPES),
    "Analytic": ASKS_ALL | LINEAR,
    "AsyncGossip": {"peers": True, "asynchronous": True, "devices": "refused"},
    "Asynchronous": {"asynchronous": True, "devices": "needed", "over_selection": False},
    "Centralised": {"pooled": True},
    "CoBoosting": ONCE | {"horizon": True},
    "FENS": ONCE | {"metrics": frozenset({"aggregator_loss"})},
    "FRAug": LINEAR | {"buffers": "all_local", "horizon": True, "labels": True},
    "FedAsync": {"asynchronous": True, "devices": "needed", "over_selection": False},
    "FedBN": {"personal": True, "buffers": "all_local", "batch_norm": True},
    "FedBuff": {"asynchronous": True, "devices": "needed", "over_selection": False},
    "FedCM": {"public_values": frozenset({"steps"})},
    "FedDF": ONCE | {"horizon": True},
    "FedETF": HEAD | {"labels": True},
    "FedLoGe": HEAD | {"labels": True},
    "FedLabel": {"labels": True, "unlabelled": True, "metrics": OF_SOME},
    "FedNTD": {"labels": True, "logits": True},
    "FedNova": {"public_values": frozenset({"work"})},
    "FedPer": HEAD | {"personal": True},
    "FedProto": {"features": True, "labels": True},
    "FedROD": HEAD | {"labels": True},
    "FedRep": HEAD | {"personal": True},
    "FedSTO": {"unlabelled": True, "labelled": "server"},
    "FedSGD": {"one_step": True},
    "FedZO": {"buffers": "average", "metrics": frozenset({"nonfinite_slopes"})},
    "FedoSSL": {"features": True, "labels": True},
    "GGEUR": {"meets_all_clients": True, "labels": True, "vectors": True},
    "Gossip": {"peers": True},
    "HeadStrategy": HEAD | {"labels": True},
    "HeteroFL": {"widths": True, "over_selection": False},
    "LocalOnly": {"personal": True, "buffers": "local"},
    "LogitAdjust": {"labels": True, "logits": True},
    "MeZO": SLOPES | {"pooled": True},
    "MoFedSAM": {"public_values": frozenset({"steps"})},
    "Moon": {"features": True},
    "OneByte": SLOPES | {"client_by_client": True},
    "OneShot": ONCE,
    "Peers": {"peers": True},
    "SemiFL": SEMI | {"labelled": "server"},
    "ServerOnly": {"labelled": "server", "metrics": OF_SOME},
    "SiloBN": {"personal": True, "buffers": "local", "batch_norm": True},
}


def every_class() -> dict[str, type]:
    """All classes of the package that have traits."""
    found: dict[str, type] = {}
    for module in pkgutil.iter_modules(strategies.__path__, "strategies."):
        for name, kind in vars(importlib.import_module(module.name)).items():
            if (
                inspect.isclass(kind)
                and kind.__module__.startswith("strategies.")
                and hasattr(kind, "traits")
            ):
                found[name] = kind
    return found


def differing(traits: Traits) -> dict[str, Any]:
    elsewhere = (
        "unread",
        "mean_only",
        "no_vectors",
        "no_optimiser",
        "asked_only",
        "counts_clients",
        "discloses",
    )
    # tests/run/test_conflicts.py, tests/contracts, tests/run/test_private_methods.py
    names = [n for n in NAMES if n not in elsewhere]
    return {n: getattr(traits, n) for n in names if getattr(traits, n) != getattr(Traits(), n)}


# -- what is said -------------------------------------------------------------------------------------------------


def test_every_class_says_what_it_is() -> None:
    found = every_class()
    assert len(found) > 35 and set(EXPECTED) <= set(found)
    assert {n: differing(k.traits) for n, k in found.items()} == {n: EXPECTED.get(n, {}) for n in found}


@pytest.mark.parametrize(
    ("name", "overrides", "changed"),
    [
        ("fedproto", ["strategy.share=prototypes"], {"buffers": "local"}),
        ("fedproto", ["strategy.share=model"], {"buffers": None}),
        ("fraug", ["strategy.share_model=silobn"], {"buffers": "local", "horizon": True}),
        ("fraug", ["strategy.share_model=all"], {"buffers": "average"}),
        ("gossip", ["strategy.bn_stats=average"], {"buffers": "average"}),
        ("gossip", ["strategy.bn_stats=null"], {"buffers": None}),
        ("logit_adjust", ["strategy.prior=all"], {"meets_all_clients": True, "labels": True}),
        ("logit_adjust", ["strategy.prior=client"], {"meets_all_clients": False}),
        ("scaffold", ["strategy.steps=reference"], {"fixed_sizes": True}),
        ("scaffold", ["strategy.steps=own"], {"fixed_sizes": False}),
        ("ggeur", ["strategy@strategy.base=fedbn"], {"buffers": "all_local", "meets_all_clients": True}),
        ("ggeur", ["strategy@strategy.base=centralised"], {"pooled": True, "labels": True}),
        ("ggeur", ["strategy@strategy.base=fednova"], {"public_values": frozenset({"work"})}),
    ],
)
def test_an_object_says_what_its_options_make_of_it(
    name: str, overrides: list[str], changed: dict[str, Any]
) -> None:
    built = method(name, *overrides)
    assert {n: getattr(built.traits, n) for n in changed} == changed
    assert type(built).traits is every_class()[type(built).__name__].traits  # the class is as it was


def test_only_a_method_that_reads_the_number_of_rounds_has_a_horizon() -> None:
    """Its settings name ``${rounds}``: no code sees the run's own number."""
    naming = {p.stem for p in (ROOT / "conf/strategy").glob("*.yaml") if "${rounds}" in p.read_text()}
    assert naming == {"fraug", "co_boosting", "feddf"}
    assert {n for n, k in every_class().items() if k.traits.horizon} == {"FRAug", "CoBoosting", "FedDF"}
    for path in [*(ROOT / "strategies").rglob("*.py"), *(ROOT / "clients").rglob("*.py")]:
        reads = {a.attr for a in ast.walk(ast.parse(path.read_text())) if isinstance(a, ast.Attribute)}
        assert "rounds" not in reads or path.name == "fraug_options.py", path


# -- what is refused ----------------------------------------------------------------------------------------------


def test_an_unknown_trait_is_refused() -> None:
    with pytest.raises(TypeError, match="asynchron"):
        Traits(asynchron=True)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"traits.buffers='own': choose one of average, local, all_local"):
        Traits(buffers="own")
    with pytest.raises(ConfigError, match=r"traits.devices='any': choose one of needed, refused"):
        Traits(devices="any")  # type: ignore[arg-type]


class Old(FedAvg):
    buffers = "local"


class Loose(FedAvg):
    traits: ClassVar[Any] = {"buffers": "local"}


class Alone:
    """Everything but the traits and the numbers of clients."""

    client = Client()

    def setup(self, task: Any, layout: Any) -> None: ...

    def init(self, server: Any) -> Any: ...

    def round(self, server: Any, state: Any, round: Any) -> Any: ...

    def models(self, state: Any) -> Any: ...

    def evaluate(self, server: Any, state: Any) -> Any: ...


class Clientless(FedAvg):
    """Its local half is none."""

    def make_client(self) -> Any:
        return Alone()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            Alone(),
            "strategy: Alone has no 'evaluate_clients', 'traits'; derive it from strategies.base.Strategy",
        ),
        (
            Clientless(server_lr=1.0, weighting="samples"),
            "strategy: its client: Alone has no .*'keeps', .*derive it from clients.base.Client",
        ),
        (
            Old(server_lr=1.0, weighting="samples"),
            r"strategy: Old.buffers is read by nobody; type traits = Traits\(buffers=...\)",
        ),
        (
            Loose(server_lr=1.0, weighting="samples"),
            r"strategy: Loose.traits is of type dict; type traits = Traits\(...\)",
        ),
    ],
    ids=["alone", "clientless", "old", "loose"],
)
def test_what_is_no_whole_strategy_is_refused_by_what_it_lacks(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run(strategy=given)


def test_an_option_may_have_the_name_of_a_trait() -> None:
    @dataclass(kw_only=True)
    class Wide(FedAvg):
        widths: int = 3

    wide = participants.strategy(compose_quickly(()), Wide(server_lr=1.0, weighting="samples"))
    assert wide.traits == FedAvg.traits


def test_the_bases_have_all_that_is_asked_of_them() -> None:
    assert missing(Strategy, StrategyLike) == missing(Client, ClientLike) == []
