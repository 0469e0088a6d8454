"""``result.model(client=k)``: the very model whose numbers the run reports of client k, in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Problem, classes, classification, network
from torch import nn

import fedsim
from clients.sgd import SGDClient
from fedsim.errors import CheckpointError, ConfigError
from fedsim.exchange.payload import Update
from fedsim.run.participants import strategy
from fedsim.run.preparation import load_data
from strategies.fedavg import FedAvg

SETTINGS = (
    "rounds=2",
    "clients_per_round=3",
    "evaluation.holdout=0.4",
    "evaluation.clients_every=2",
    "client.lr=0.3",
)
GOSSIP = ("topology=ring", "clients_per_round=6")
METHODS = {  # settings by which clients have models of their own
    "fedper": (),
    "fedrep": (),
    "ditto": (),
    "local_only": (),
    "fedavg_ft": (),
    "fedloge": (),
    "fedrod": (),
    "fedproto": (),
    "fedbn": (),
    "silobn": (),
    "fraug": (),
    "gossip": GOSSIP,
    "ggeur": ("strategy@strategy.base=fedper", "strategy.target=20", "strategy.per_prototype=5"),
    "fedavg": ("buffers=local", "attack=label_flip", "attack.fraction=0.4"),
}


def problem(kind: str = "bn", **changes: Any) -> Problem:
    return classification(kind, **{"clients": classes((20, 16, 24, 18, 21, 30)), **changes})


def holdout(result: fedsim.RunResult, client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the client is measured on."""
    source = result.source
    assert source is not None
    data = load_data(source.config, source.given, strategy(source.config, source.given.strategy))
    held = data.client_holdout(client, torch.float32)
    assert held is not None and len(held)
    batch = held.everything()
    return batch.x, batch.y


def reported(result: fedsim.RunResult, metric: str = "evaluate/accuracy") -> dict[int, float]:
    table = result.per_client
    last = table[(table["round"] == 2) & (table.metric == metric)]
    return dict(zip(last.client, last.value, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_it_has_the_accuracy_that_the_run_reports(name: str) -> None:
    result = problem().run(f"strategy={name}", *SETTINGS, *METHODS[name])
    told = reported(result)
    assert sorted(told) == list(range(6))
    for client, accuracy in told.items():  # those that never took part as well
        model = result.model(client=client)
        assert not model.training
        x, y = holdout(result, client)
        with torch.no_grad():
            found = (model(x).argmax(1) == y).double().mean()
        assert float(found) == pytest.approx(accuracy)
    states = [torch.cat([t.flatten().float() for t in result.model(c).state_dict().values()]) for c in (0, 1)]
    assert not torch.equal(*states)


def test_a_head_without_bias_gets_one_where_the_private_head_has_it() -> None:
    model = network()
    model[-1] = nn.Linear(5, 3, bias=False)
    result = problem("tanh", model=model).run("strategy=fedrod", *SETTINGS)
    own = result.model(client=2)
    assert own.head.bias is not None and result.model().head.bias is None
    x, y = holdout(result, 2)
    assert float((own(x).argmax(1) == y).double().mean()) == pytest.approx(reported(result)[2])


def test_a_loaded_run_gives_the_same_ones_if_the_same_things_are_handed_over(tmp_path: Path) -> None:
    given = {"model": network("bn"), "clients": classes((20, 16, 24, 18, 21, 30))}
    result = problem().run("strategy=ditto", f"dir={tmp_path}", *SETTINGS, **given)
    test = problem().test
    again = fedsim.load_run(tmp_path, test=test, **given)
    for client in (0, 3):
        for one, other in zip(
            result.model(client).parameters(), again.model(client).parameters(), strict=True
        ):
            assert torch.equal(one, other)
    with pytest.raises(ConfigError, match=r"model=\.\.\., clients=\.\.\. of this run came from Python"):
        fedsim.load_run(tmp_path).model(client=0)
    with pytest.raises(ConfigError, match="not what the run was made of"):
        fedsim.load_run(tmp_path, **{**given, "clients": given["clients"][::-1]}, test=test).model(client=0)


class Guess(SGDClient):
    """Measures in a way that nobody else knows."""

    def evaluate(self, job: Any) -> Update:
        return Update(metrics={"accuracy": 1.0})


class Guessing(FedAvg):
    def make_client(self) -> Guess:
        return Guess(weighting=self.weighting)


@pytest.mark.parametrize(
    ("settings", "given", "ask", "said"),
    [
        (("strategy=fedavg",), {}, {"client": 0}, "FedAvg has one model for all clients, no personal ones"),
        (("strategy=fedbn",), {"model": network()}, {"client": 0}, "FedBN has one model for all clients"),
        (("strategy=fedper",), {}, {"client": 6}, "client=6: this run has clients 0 to 5"),
        (("strategy=fedper",), {}, {"client": -1}, "client=-1: this run has clients 0 to 5"),
        (("strategy=fedper",), {}, {"client": 0, "best": True}, "of the last round only"),
        (("strategy=centralised",), {}, {"client": 0}, "Centralised has one model"),
        (
            (),
            {"strategy": Guessing(server_lr=1.0, weighting="samples")},
            {"client": 0},
            r"define Guess\.own_weights",
        ),
    ],
)
def test_what_has_no_personal_model_says_so_in_a_line(settings: Any, given: Any, ask: Any, said: str) -> None:
    result = problem().run(*settings, "rounds=1", **given)
    with pytest.raises(ConfigError, match=said) as error:
        result.model(**ask)
    assert "\n" not in str(error.value)


def test_an_older_result_of_a_run_that_went_on_is_told_apart(tmp_path: Path) -> None:
    settings = ("strategy=fedper", f"dir={tmp_path}")
    first = problem().run(*settings, "rounds=1")
    problem().run(*settings, "rounds=2")
    with pytest.raises(CheckpointError, match="has gone on to round 2, this result is of round 1"):
        first.model(client=0)
