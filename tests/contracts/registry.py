"""The strategies that every contract is tried on. A new option of ``conf/strategy`` is tried as it stands; a line here
is for one that needs other settings, or keeps a contract in its own way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Entry:
    """A strategy under a label: its option in ``conf/strategy`` and further overrides."""

    label: str
    strategy: str
    overrides: tuple[str, ...] = ()
    adds_samples: bool = False  # trains on samples made for each client, of class labels only
    draws: bool = False  # noise of each client's own enters its update, so that equal clients differ
    needs_head: bool = False  # a model with features, a linear head and class labels
    asynchronous: bool = False  # starts clients by itself: has no cohorts that could be given
    parts: bool = False  # clients train parts of the model, of layers that can be cut: no BatchNorm
    spreads: bool = False  # who takes part in the first round answers twice in it
    clusters: bool = False  # a model per cluster; the global one is their mean
    two_views: bool = False  # a batch passes the model as two views of each sample, in one pass
    weighs: bool = False  # gives clients weights that are neither their sample counts nor equal
    semi: bool = False  # some of the samples have no labels; which ones hangs on the client
    trains_alone: bool = False  # the server trains on samples of its own, whoever answers
    single: bool = False  # the server looks at single updates, as at centroids of each client
    still: bool = False  # slopes: the model is never in training mode, so no statistics are collected
    scalars: bool = False  # clients send numbers, of which no vector is folded
    once: bool = False  # asks for all clients' models in its first round, and for none after it
    frozen: bool = False  # once all clients have answered, the model stays what it is

    def model(self, kind: str) -> str:
        """The kind of network, without BatchNorm where the method cannot train it."""
        return "tanh" if self.parts and kind == "bn" else kind

    def moves(self, rounds: int) -> int:
        """How many different models so many rounds give."""
        return 1 if self.frozen else rounds

    @property
    def arguments(self) -> tuple[str, ...]:
        """Overrides that select it."""
        return (f"strategy={self.strategy}", *self.overrides)

    def has(self, group: str) -> bool:
        """Whether it chooses an option of another group, such as ``attack``."""
        return any(o.startswith(f"{group}=") for o in self.overrides)


NOISE = ("view@views.strong=noise", "views.strong.sigma=0.1")  # of tables
AT_CLIENTS = ("data.labelled={at: client, share: 0.5}", *NOISE)
SMALL_GENERATOR = (
    "strategy.generator=mlp",
    "strategy.samples=8",
    "strategy.batch_size=4",
    "strategy.noise=4",
    "strategy.width=6",
    "strategy.generator_steps=3",
    "strategy.epochs=5",
)
ON_NOISE = ("strategy.data=noise", "strategy.noise_samples=12", "strategy.steps=6", "strategy.epochs=5")
# These ask all clients in the first round, most of them nobody after it: once.py says what becomes of contracts
ONE_SHOT = (
    Entry("one-shot", "one_shot", once=True, frozen=True),
    Entry("co-boosting", "co_boosting", SMALL_GENERATOR, once=True),
    Entry("dense", "dense", SMALL_GENERATOR, once=True),
    Entry("feddf", "feddf", ON_NOISE, once=True),
    Entry("fens", "fens", once=True, frozen=True, draws=True),
    Entry("analytic", "analytic", frozen=True, needs_head=True),
)
STABLE = (
    "strategy.lam_2=1",
)  # 10, with lr=0.1, would carry psi as far beyond sigma each step, and rounding with it
AT_SERVER = ("data.labelled={at: server, count: 9}", *NOISE)
BOXES = (  # of classifiers: one "box" a sample
    "strategy.decode._target_=problems.guessed_boxes",
    "strategy.losses.path=problems.guessed_losses",
    "strategy.backbone=*0.*",
    "strategy.warmup_rounds=1",
    "strategy.lo=0.12",
    "strategy.hi=0.4",
)
TWO_AT_A_TIME = ("system=lognormal", "strategy.concurrency=2")

LISTED = (
    Entry("fedavg", "fedavg"),
    Entry("fedavg-uniform", "fedavg", ("strategy.weighting=uniform", "strategy.server_lr=0.5")),
    Entry("fedspeed", "fedspeed"),
    Entry("fedspeed-active", "fedspeed", ("strategy.dual_mean=active", "strategy.alpha=0.5")),
    Entry("fedprox", "fedprox"),
    Entry("scaffold", "scaffold"),
    Entry("scaffold-1", "scaffold", ("strategy.option=1",)),
    Entry("fedcm", "fedcm"),
    Entry("feddyn", "feddyn"),
    Entry("fedadam", "fedadam"),
    Entry("fedyogi", "fedyogi"),
    Entry("fedadagrad", "fedadagrad"),
    Entry("fedavgm", "fedavgm"),
    Entry("fedsam", "fedsam"),
    Entry("mofedsam", "mofedsam"),
    Entry("fednova", "fednova"),
    Entry("moon", "moon", needs_head=True),
    Entry("gossip", "gossip", ("topology=ring", "strategy.init_models=shared")),
    Entry("fedntd", "fedntd", needs_head=True),
    Entry("fedproto", "fedproto", ("strategy.share=model",), needs_head=True),
    Entry("ggeur", "ggeur", ("strategy.target=6",), adds_samples=True, needs_head=True),
    Entry(
        "ggeur-scaffold",
        "ggeur",
        ("strategy.target=6", "strategy@strategy.base=scaffold"),
        adds_samples=True,
        needs_head=True,
    ),
    Entry("silobn", "silobn"),
    Entry("fraug", "fraug", ("strategy.rounds=6",), draws=True, needs_head=True),
    Entry("fedspeed-relaxed", "fedspeed", ("strategy.beta=0.2", "strategy.weighting=samples")),
    Entry("fedsgd", "fedsgd", ("client.steps=1",)),
    Entry("flag", "fedavg", ("aggregator=flag",)),
    Entry("flag-reverse", "scaffold", ("aggregator=flag", "attack=reverse", "attack.fraction=0.34")),
    Entry("alie", "fedspeed", ("attack=alie", "attack.fraction=0.34")),
    Entry(
        "centered",
        "fedavg",
        (
            "aggregator=centered_clipping",
            "aggregator.tau=0.1",
            "aggregator.before=[{bucketing: {s: 2}}]",
            "attack=alie_optimal",
            "attack.fraction=0.34",
        ),
    ),
    Entry("fedloge", "fedloge", needs_head=True),
    Entry("fedloge-head", "fedloge", ("strategy.train=head", "strategy.sse.bias=random"), needs_head=True),
    Entry("fedavg-ft", "fedavg_ft"),
    Entry("ditto", "ditto"),
    Entry("fedper", "fedper", needs_head=True),
    Entry("fedrep", "fedrep", needs_head=True),
    Entry("fedrod", "fedrod", needs_head=True),
    Entry("fedetf", "fedetf", needs_head=True),
    Entry("logit-adjust", "logit_adjust", needs_head=True),
    Entry("logit-adjust-all", "logit_adjust", ("strategy.prior=all",), needs_head=True),
    Entry("qfedavg", "qfedavg", weighs=True),
    Entry("term", "term", ("strategy.weighting=uniform",), weighs=True),
    Entry("afl", "afl", weighs=True),
    Entry("ifca", "ifca", ("strategy.k=2",), clusters=True, spreads=True),
    Entry("fesem", "fesem", ("strategy.k=2",), clusters=True, spreads=True),
    Entry(
        "cfl",
        "cfl",
        ("strategy.stale=20", "strategy.first_round=2", "strategy.min_size=2", "strategy.ratio=100"),
    ),
    Entry(
        "fedossl",
        "fedossl",
        ("strategy.cal_start=2", "strategy.centroids=4", "strategy.server_steps=3", "strategy.memory=40"),
        draws=True,
        needs_head=True,
        two_views=True,
        single=True,
    ),
    Entry("heterofl", "heterofl", ("client.classes=[{share: 1}, {share: 1, width: 0.5}]",), parts=True),
    Entry("fedlabel", "fedlabel", (*AT_CLIENTS, "strategy.beta=0.35"), semi=True, needs_head=True),
    Entry("fixmatch", "fixmatch", (*AT_CLIENTS, "strategy.tau=0.35"), semi=True, needs_head=True),
    Entry("uda", "uda", (*AT_CLIENTS, "strategy.tau=0.35"), semi=True, needs_head=True),
    Entry(
        "fedmatch",
        "fedmatch",
        (*AT_CLIENTS, "strategy.confidence=0.35", "strategy.helpers_every=2", *STABLE),
        semi=True,
        needs_head=True,
        single=True,
    ),
    Entry(
        "semifl", "semifl", (*AT_SERVER, "strategy.tau=0.35"), semi=True, needs_head=True, trains_alone=True
    ),
    Entry("rolora", "rolora", ('strategy.turns=[["*.weight"], ["*.bias"]]',), needs_head=True),
    Entry("one-byte", "one_byte", ("strategy.lr=0.05",), draws=True, still=True),
    Entry("decomfl", "decomfl", ("strategy.lr=0.05",), still=True, scalars=True),
    Entry(
        "fedkseed",
        "fedkseed",
        ("strategy.lr=0.01", "strategy.pool=6", "strategy.local_steps=4"),
        draws=True,
        still=True,
        scalars=True,
    ),
    Entry("fedzo", "fedzo", ("strategy.directions=2",), draws=True, still=True),
    Entry(
        "fedsto",
        "fedsto",
        (*AT_SERVER, *BOXES, "strategy.selective_rounds=1", "strategy.lam=0.01"),
        semi=True,
        needs_head=True,
        trains_alone=True,
    ),
    Entry("fedbuff", "fedbuff", (*TWO_AT_A_TIME, "strategy.buffer=3"), asynchronous=True),
    Entry("fedasync", "fedasync", (*TWO_AT_A_TIME, "strategy.answers_per_round=3"), asynchronous=True),
    *ONE_SHOT,
)
# Options that tests of their own try: settings of a method above, references, what needs adapters or other peers.
ELSEWHERE = (
    *(
        "centralised",
        "dpsgd",
        "fed_ao",
        "fedbn",
        "fedex",
        "fedit",
        "fedossl_as_code",
        "fedsa",
        "ffa",
        "flora",
        "ranked_lora",
    ),
    *(
        "fraug_digits",
        "fraug_officehome",
        "gossip_async",
        "gossip_fedavg",
        "local_only",
        "mezo",
        "pseudo_ema",
    ),
    "server_only",
)


def unlisted() -> list[str]:
    """Options of ``conf/strategy`` that nothing above names: new methods."""
    options = sorted(p.stem for p in (Path(__file__).parents[2] / "conf/strategy").glob("*.yaml"))
    known = {*ELSEWHERE, *(e.strategy for e in LISTED)}
    return [option for option in options if option not in known]


NEW = tuple(Entry(option, option) for option in unlisted())  # tried in all ways, none of them nightly
TABLE = (*LISTED, *NEW)

METHODS = tuple({e.strategy: e for e in reversed(TABLE)}.values())[::-1]  # the first entry of each strategy
COHORTS = tuple(e for e in TABLE if not e.asynchronous)  # what can be given cohorts

# One of every way of working: what mostly tries the engines is tried on these in more ways than on the others.
BROAD = ("fedavg", "fedspeed", "scaffold", "ggeur", "fraug", "fedloge", "gossip", "flag-reverse")


# One of every way in which results come back: sums and client state, several exchanges, single updates and attackers
# that see them, peers, answers one by one.
MECHANISMS = tuple(e for e in TABLE if e.label in ("scaffold", "ggeur", "flag-reverse", "gossip", "fedbuff"))


# Methods that differ from another one above in the server's step or one option alone: their contracts are nightly.
CLOSE = (
    *("centered", "fedyogi", "fedadagrad", "fedavgm", "mofedsam", "term", "uda", "fesem", "fedrep", "rolora"),
    *("decomfl", "fedkseed", "fedzo", "fedsto", "one-shot", "dense", "feddf"),
)


# One of every way in which a method works. What hangs on the simulator's parts more than on the method is tried on
# these in `make test`, and on all of them nightly.
SPREAD = (
    "fedavg",
    "fedspeed",
    "scaffold",
    "fedadam",
    "gossip",
    "ggeur",
    "silobn",
    "fraug",
    "fedloge",
    "flag-reverse",
    "ifca",
    "heterofl",
    "fedlabel",
    "semifl",
    "one-byte",
    "fedbuff",
)


def mostly(entries: Iterable[Entry]) -> list[Any]:
    """The entries as parameters of a test; those that are close to another one run nightly."""
    entries = tuple(entries)
    return often(entries, *(e.label for e in entries if e.label not in CLOSE))


def often(entries: Iterable[Entry], *labels: str) -> list[Any]:
    """The entries as parameters of a test: those named run in `make test`, all of them nightly."""
    labels = (*labels, *(e.label for e in NEW))
    return [pytest.param(e, marks=[] if e.label in labels else pytest.mark.nightly) for e in entries]


def broad(*ways: object) -> list[tuple[Entry, object]]:
    """Every entry in the first of ``ways``, a few in all of them."""
    return [(e, way) for way in ways for e in TABLE if way is ways[0] or e.label in BROAD]
