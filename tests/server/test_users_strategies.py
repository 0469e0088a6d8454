"""Strategies' own code: nothing that they are given is written to, and what they return is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from callbacks import Interrupt
from problems import classification, hashes, method
from torch import Tensor

from fedsim.errors import StrategyError
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff

MINE = {"server_lr": 1.0, "weighting": "samples"}


class InPlace(FedAvg):
    """The step that a user of torch writes first."""

    def update(self, state: Any, replies: Any, round: Any) -> Any:
        state["w"] += self.aggregate(replies)
        return state


class Uses(FedAvg):
    """May overwrite what it folded: that is its own."""

    def update(self, state: Any, replies: Any, round: Any) -> Any:
        return state | {"w": self.aggregate(replies).add_(state["w"])}


class Evaluates(FedAvg):
    def evaluate(self, server: Any, state: Any) -> Any:
        state["w"].mul_(0.9)
        return super().evaluate(server, state)


class Whole(FedAvg):
    """Its own shape of a round."""

    def round(self, server: Any, state: Any, round: Any) -> Any:
        replies = server.exchange(self.message(state, round), self.folds)
        torch.add(state["w"], replies.mean("delta"), out=state["w"])
        return {**state}


class Absorbs(FedBuff):
    def absorb(self, state: Any, answer: Any) -> Any:
        answer.sent["w"].add_(1)
        return super().absorb(state, answer)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (InPlace, r"InPlace.update wrote to state\['w'\]"),
        (Evaluates, r"Evaluates.evaluate wrote to state\['w'\]"),
        (Whole, r"Whole.round wrote to state\['w'\]"),
    ],
)
def test_writing_to_the_old_state_is_refused_by_name(kind: type[FedAvg], said: str, tmp_path: Any) -> None:
    with pytest.raises(StrategyError, match=said):
        classification().run("evaluation.every=1", f"dir={tmp_path}", strategy=kind(**MINE))
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()


def test_an_asynchronous_strategy_must_not_change_what_was_sent() -> None:
    strategy = method("fedbuff", "strategy.buffer=2", "strategy.concurrency=3")
    strategy.__class__ = Absorbs
    with pytest.raises(StrategyError, match=r"Absorbs.absorb wrote to (state|sent)\['w'\]"):
        classification().run("system=lognormal", strategy=strategy)


def test_a_state_written_to_is_not_checkpointed(tmp_path: Any) -> None:
    """An interrupt between the write and its discovery leaves the last good checkpoint."""

    class Late(FedAvg):
        def update(self, state: Any, replies: Any, round: Any) -> Any:
            if round.index == 2:
                state["w"].add_(1)
                raise KeyboardInterrupt
            return super().update(state, replies, round)

    place = (f"dir={tmp_path}", "checkpoint.every=2")
    with pytest.raises(KeyboardInterrupt) as caught:
        classification().run(*place, strategy=Late(**MINE))
    assert "state['w'] was written to" in caught.value.__notes__[0]
    assert [p.name for p in (tmp_path / "checkpoint").glob("*2*")]


def test_what_was_folded_belongs_to_the_strategy() -> None:
    assert hashes(classification().run(strategy=Uses(**MINE))) == hashes(classification().run())


def returning(at: str, hook: Callable[[Any], Any]) -> FedAvg:
    """FedAvg whose method ``at`` returns what ``hook`` makes of it."""

    def changed(self: Any, *arguments: Any) -> Any:
        return hook(getattr(FedAvg, at)(self, *arguments))

    return type("Mine", (FedAvg,), {at: changed})(**MINE)


WRONG: list[tuple[str, Callable[[Any], Any], str]] = [
    (
        "update",
        lambda s: None,
        r"Mine.update returned None, expected the next state, a dict.*is there a return",
    ),
    ("update", lambda s: s["w"], r"Mine.update returned Tensor of shape \(\d+,\), expected the next state"),
    ("update", lambda s: {"w": s["w"]}, r"Mine.update returned a state without 'buffers' \(it has 'w'\)"),
    (
        "update",
        lambda s: s | {"w": s["w"][:1]},
        r"Mine.update returned state\['w'\] as Tensor of shape \(1,\)",
    ),
    ("update", lambda s: s | {"w": s["w"].double()}, r"torch.float32, not torch.float64"),
    ("round", lambda s: None, r"Mine.round returned None, expected the next state"),
    ("init", lambda s: None, r"Mine.init returned None, expected the next state"),
    ("init", lambda s: {}, r"Mine.models finds no 'w' in the state"),
    ("message", lambda m: None, r"Mine.message returned None, expected a Message"),
    ("models", lambda m: None, r"Mine.models returned None, expected a dict with a model named"),
    ("models", lambda m: {"global": m["global"].w}, r"Mine.models returned model 'global' as Tensor"),
    ("evaluate", lambda m: None, r"Mine.evaluate returned None, expected a dict of numbers"),
    ("evaluate_clients", lambda m: None, r"Mine.evaluate_clients returned None, expected a dict of numbers"),
]


@pytest.mark.parametrize(("at", "hook", "said"), WRONG)
def test_what_a_strategy_returns_wrongly_is_named(at: str, hook: Callable[[Any], Any], said: str) -> None:
    settings = ("evaluation.every=1", "evaluation.holdout=0.3", "evaluation.clients_every=1")
    with pytest.raises(StrategyError, match=said):
        classification().run(*settings, strategy=returning(at, hook))


def test_an_aggregator_that_returns_nothing_is_named() -> None:
    def rule(updates: Tensor, weights: Tensor | None = None) -> Any:
        updates.mean(0)

    strategy = method("fedavg")
    strategy.aggregator = rule
    with pytest.raises(StrategyError, match=r"FedAvg.aggregator returned None, expected a tensor of shape"):
        classification().run(strategy=strategy)


class Draws(FedAvg):
    """Draws at the server without a generator of its own."""

    def update(self, state: Any, replies: Any, round: Any) -> Any:
        return super().update(state, replies, round) | {"w": state["w"] + torch.randn(len(state["w"]))}


def test_draws_of_strategies_repeat_after_a_resumption(tmp_path: Any) -> None:
    expected = hashes(classification().run(strategy=Draws(**MINE)))
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        classification().run(f"dir={tmp_path}", strategy=Draws(**MINE), callbacks=[Interrupt(2)])
    torch.manual_seed(6)
    assert hashes(classification().run(f"dir={tmp_path}", strategy=Draws(**MINE))) == expected


class Counts(FedAvg):
    """Keeps a number on itself, past any freezing."""

    def update(self, state: Any, replies: Any, round: Any) -> Any:
        object.__setattr__(self, "steps", getattr(self, "steps", 0) + 1)
        return super().update(state, replies, round)


class Collects(FedAvg):
    seen: list[int] = []  # noqa: RUF012 - that is the mistake

    def message(self, state: Any, round: Any) -> Any:
        self.seen.append(round.index)
        return super().message(state, round)


class Divides(FedAvg):
    def update(self, state: Any, replies: Any, round: Any) -> Any:
        return state | {"w": state["w"] + 1 / round.index}


class NotANumber(FedAvg):
    def update(self, state: Any, replies: Any, round: Any) -> Any:
        return state | {"w": state["w"] / 0}


class Lists(FedAvg):
    def update(self, state: Any, replies: Any, round: Any) -> Any:
        return super().update(state, replies, round) | {"past": [state["w"]]}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Counts, r"Counts.round in round 1 changed Counts.steps, which no checkpoint holds"),
        (Divides, r"Divides.update failed in round 1: ZeroDivisionError: division by zero"),
        (
            NotANumber,
            r"NotANumber returned state\['w'\] with \d+ numbers of \d+ that are NaN or infinite in round 1",
        ),
        (Lists, r"Lists: strategy state 'past' holds what a checkpoint cannot: .*use tensors"),
    ],
)
def test_a_strategy_at_fault_is_named_in_the_first_round(
    kind: type[FedAvg], said: str, tmp_path: Any
) -> None:
    with pytest.raises(StrategyError, match=said) as caught:
        classification().run("rounds=3", f"dir={tmp_path}", strategy=kind(**MINE))
    if kind is Divides:
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()


def test_a_strategy_that_takes_notes_in_a_list_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    classification().run("rounds=3", strategy=Collects(**MINE))
    said = [r.getMessage() for r in caplog.records if "Collects.seen" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith(
        "Collects.round in round 1 changed Collects.seen, which no checkpoint"
    )
