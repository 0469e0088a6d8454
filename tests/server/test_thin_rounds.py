"""Rounds in which fewer updates came than the aggregator needs: counted, skipped, or the end of the run."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import Recorded, classification, hashes, method, network
from rich.console import Console
from scipy.sparse import csr_array

from clients.sgd import SGDClient
from fedsim.errors import ConfigError, FedsimError, ThinRoundError
from fedsim.exchange.packing import pack
from fedsim.exchange.payload import Outcome
from fedsim.report.prose import failures
from fedsim.server.lost import lost
from fedsim.task.layout import Layout
from fedsim.tracking.console import ConsoleTracker
from strategies import aggregators
from strategies.averaging import mix

LOSSY = (
    "attack=drop",
    "attack.loss=1",
    "attack.packet=null",
)  # attackers answer, but their update never comes
FIVE = ("clients_per_round=5", "aggregator=krum", "aggregator.f=1")
THIN = "krum: f=1 needs n >= 2f + 3 = 5 updates, got 4"


class Keep:
    """A rule that notes what it is given, and moves nothing."""

    def __init__(self) -> None:
        self.notes: list[tuple[torch.Tensor, int]] = []

    def __call__(self, updates: torch.Tensor, weights: Any = None, *, removed: int = 0) -> torch.Tensor:
        self.notes.append((updates.clone(), removed))
        return torch.zeros_like(updates[0])


def one_round(rule: Any, n: int) -> Recorded:
    """The only round of ``n`` clients, of which one sends NaN."""
    strategy = Recorded(method("fedavg"))
    strategy.inner.aggregator = rule
    settings = ("rounds=1", f"clients_per_round={n}", "attack=nonfinite", "attack.fraction=0.16")
    classification(cohorts=[range(n)]).run("dtype=float64", *settings, strategy=strategy)
    return strategy


@pytest.mark.parametrize(
    ("rule", "n"), [("krum", 5), ("multi_krum", 5), ("trimmed_mean", 3), ("meamed", 3), ("phocas", 3)]
)
def test_a_run_without_its_nan_client_gives_what_the_function_gives(
    rule: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.run.participants.draw_attackers", lambda *_: [1])
    kept, function = Keep(), getattr(aggregators, rule)
    start = one_round(kept, n).states[-1]["w"]
    ((updates, removed),) = kept.notes
    assert (len(updates), removed) == (n - 1, 1)
    with pytest.raises(ValueError, match="needs n >="):
        function(updates, f=1)
    nan = torch.full_like(updates[:1], torch.nan)
    step = function(torch.cat([updates[:1], nan, updates[1:]]), f=1, report={})
    assert torch.equal(function(updates, f=1, removed=1), step)
    run = one_round(partial(function, f=1), n)
    assert torch.equal(run.states[-1]["w"], start + pack({"w": step}, Layout(network().double()))[0]["w"])


def test_a_thin_round_is_skipped_and_named() -> None:
    result = classification().run("strategy=scaffold", *FIVE, *LOSSY, "rounds=3", "attack.fraction=0.5")
    thin = [row.get("thin_round") for row in result.rows]
    few = [row["failures"] and len(row["cohort"]) - len(row["failures"]) < 5 for row in result.rows]
    assert all(few) and all(text.startswith("krum: f=1 needs n >= 2f + 3 = 5 updates, got ") for text in thin)
    assert len(set(hashes(result))) == 1 and result.summary["thin_rounds"] == 3
    assert json.loads((result.dir / "summary.json").read_text())["status"] == "done"
    saved = json.loads((result.dir / "checkpoint/round-000003/checkpoint.json").read_text())
    assert saved["clients"]["clients"] == {}, "what clients would keep is forgotten too"


def test_a_run_goes_on_after_a_thin_round() -> None:
    """The second of three given cohorts is too small: the others move the model as without it."""
    cohorts = [[0, 1, 2, 3, 4], [0, 1, 2, 3], [1, 2, 3, 4, 5]]
    result = classification(cohorts=cohorts).run(*FIVE, "rounds=3")
    first, second, third = hashes(result)
    assert first == second != third
    assert [row.get("thin_round") for row in result.rows] == [None, THIN, None]


def test_a_thin_round_stops_the_run_if_that_is_wanted() -> None:
    problem = classification(cohorts=[[0, 1, 2, 3, 4], [0, 1, 2, 3]])
    with pytest.raises(ThinRoundError) as raised:
        problem.run(*FIVE, "rounds=2", "failures.thin_round=stop")
    text = str(raised.value)
    assert text.startswith(f"round 2: {THIN}. ") and "type failures.thin_round=skip" in text
    assert not isinstance(raised.value, ConfigError), "it happens at run time: exit code 1"


def test_phase_0_of_a_thin_round_is_not_done_again() -> None:
    strategy = Recorded(method("ggeur", "strategy.target=6"))
    strategy.inner.aggregator = partial(aggregators.krum, f=1)
    result = classification().run("rounds=2", *FIVE[:1], *LOSSY, "attack.fraction=0.5", strategy=strategy)
    assert all(row["thin_round"].startswith("krum: f=1 needs") for row in result.rows)
    assert ["rank_mean" in row for row in result.rows] == [True, False], "statistics are merged once"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("aggregator=krum", "aggregator.f=1"),
            r"aggregator.f=1: krum needs 2f \+ 3 = 5 updates, clients_per_round=3 gives 3; "
            "type clients_per_round=5 or aggregator.f=0",
        ),
        (
            ("aggregator=bulyan", "aggregator.f=1", "participation=bernoulli"),
            r"bulyan needs 4f \+ 3 = 7 updates, clients_per_round=3 gives 3; "
            "type clients_per_round=7 num_clients=7 or aggregator.f=0",
        ),
        (
            ("aggregator=multi_krum", "aggregator.f=0", "aggregator.m=4"),
            "aggregator.m=4: multi_krum averages 4 updates, clients_per_round=3 gives 3; "
            "type clients_per_round=4 or aggregator.m=3",
        ),
        (
            ("strategy=centralised", "aggregator=trimmed_mean", "aggregator.f=1"),
            "all samples lie in one place, so there is one update; leave it out",
        ),
        (
            ("strategy=ggeur", "aggregator=krum", "aggregator.f=1"),
            "aggregator.f=1: krum needs .* clients_per_round=3",
        ),
        (
            ("strategy=fedbuff", "system=lognormal", "aggregator=krum", "aggregator.f=2"),
            "strategy.buffer=5 gives 5; type strategy.buffer=7 or aggregator.f=1",
        ),
        (
            (
                "strategy=gossip",
                "strategy.averaging=plain",
                "topology=ring",
                "aggregator=krum",
                "aggregator.f=1",
            ),
            "krum needs .* the peer with the fewest neighbours, 2, gives 2; type a topology of degree 5",
        ),
    ],
)
def test_a_rule_for_more_updates_than_there_can_be_is_refused(
    settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run(*settings)


def test_the_largest_of_the_given_cohorts_counts() -> None:
    with pytest.raises(ConfigError, match=r"clients_per_round=4 gives 4; type clients_per_round=5 or aggreg"):
        classification(cohorts=[[0, 1, 2], [0, 1, 2, 3]]).run("rounds=2", *FIVE)


# -- rounds without any update ----------------------------------------------------------------------------------------

LOST = ("attack=nonfinite", "attack.fraction=1", "rounds=2")
NONE = "no update counted: 3 not finite (client "


class Broken(SGDClient):
    def step(self, job: Any, w: torch.Tensor, batch: Any) -> torch.Tensor:
        raise ValueError("boom")


def test_a_run_without_any_finite_update_is_no_success(tmp_path: Path) -> None:
    said = r"no update of any client counted in any of the 2 rounds.*round 1: no update counted: 3 not finite"
    for _ in range(2):  # asked for again it is not done either
        with pytest.raises(ThinRoundError, match=said):
            classification().run(*LOST, f"dir={tmp_path}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["thin_rounds"], summary["rounds"]) == ("failed", 2, 2)
    assert not (tmp_path / "weights.safetensors").exists()
    strategy = method("fedavg")
    strategy.client = Broken(weighting="samples")
    with pytest.raises(ThinRoundError, match=r"no update counted: 3 failed \(client \d: ValueError: boom"):
        classification().run("rounds=2", "failures.policy=skip", strategy=strategy)


def test_a_sum_of_too_few_says_how_many_were_needed() -> None:
    why = "secure aggregation is void: 3 of 5 clients answered, 4 are needed"
    gone = [Outcome(client, "dropped", reason="lost during training") for client in (0, 1)]
    void = [Outcome(client, "dropped", reason=why) for client in (2, 3, 4)]
    assert lost(gone + void) == why
    assert lost(gone) == "nobody answered: 2 dropped out"


def test_a_single_round_without_any_update_is_named_or_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.run.participants.draw_attackers", lambda *_: [0, 1, 2])
    problem = classification(cohorts=[[0, 1, 2], [0, 3, 4]])
    result = problem.run(*LOST)
    first, second = (row.get("thin_round") for row in result.rows)
    assert first.startswith(NONE + "0: ") and second is None and result.summary["thin_rounds"] == 1
    with pytest.raises(ThinRoundError, match="round 1: no update counted: 3 not finite"):
        problem.run(*LOST, "failures.thin_round=stop")


# -- peers ------------------------------------------------------------------------------------------------------------


def test_a_peer_that_heard_too_few_keeps_its_model() -> None:
    own = np.arange(8.0).reshape(4, 2)
    arrived = csr_array(np.array([[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]], dtype=float))
    rule = partial(aggregators.trimmed_mean, f=1)
    models, shares = own.copy(), arrived * 0.25
    short = mix(models, models, np.full(4, 0.25), shares, arrived, (), rule=rule)
    assert short == {1: "trimmed_mean: f=1 needs n >= 2f + 1 = 3 updates, got 2"}
    np.testing.assert_array_equal(models[[1, 3]], own[[1, 3]])
    np.testing.assert_allclose(models[0], own[0] + 0.75 * (own[2] - own[0]))  # the middle of peers 1, 2, 3


PEERS = ("strategy.averaging=plain", "topology=complete", "clients_per_round=6", "strategy.loss=0.4")


@pytest.mark.parametrize("strategy", ["gossip", "gossip_async"])
def test_peers_that_kept_their_model_are_named(strategy: str) -> None:
    settings = (f"strategy={strategy}", *PEERS, "aggregator=trimmed_mean", "aggregator.f=2", "rounds=2")
    settings += ("strategy.ticks_per_round=20", "strategy.trigger=wakeup") * (strategy == "gossip_async")
    result = classification().run(*settings)
    named = [row["thin_round"] for row in result.rows if "thin_round" in row]
    assert named and all(text.startswith("peers that kept their own model: ") for text in named)
    with pytest.raises(ThinRoundError, match=r"round \d: peers that kept their own model: \d"):
        classification().run(*settings, "failures.thin_round=stop")


# -- where it is seen -------------------------------------------------------------------------------------------------


def test_console_and_report_name_thin_rounds() -> None:
    text = io.StringIO()
    tracker = ConsoleTracker("quiet", Console(file=text, width=200))
    row = {"round": 7, "thin_round": THIN, "failures": []}
    tracker.round(row, [])
    assert text.getvalue() == f"round 7: too few updates: {THIN}\n"
    run = SimpleNamespace(rows=[{"round": 6}, row], seed=3, status="done", summary={})
    html = failures([SimpleNamespace(label="fedavg", runs=[run])])  # type: ignore[list-item]
    assert "fedavg, seed 3: too few updates in 1 of 2 rounds, the first of them 7 (krum: f=1 needs" in html


def test_a_rule_of_ones_own_may_say_that_it_got_too_few() -> None:
    from fedsim.errors import TooFewUpdates

    def rule(updates: torch.Tensor, weights: Any = None) -> torch.Tensor:
        if len(updates) < 3:
            raise TooFewUpdates("mine: needs 3")
        return updates.mean(0)

    strategy = method("fedavg")
    strategy.aggregator = rule
    result = classification(cohorts=[[0, 1], [0, 1, 2]]).run("rounds=2", strategy=strategy)
    assert [row.get("thin_round") for row in result.rows] == ["mine: needs 3", None]
    assert issubclass(TooFewUpdates, FedsimError)
