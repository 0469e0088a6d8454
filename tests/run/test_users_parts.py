"""Parts of users' own that cannot work, or would have no effect: named, instead of trained without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composing import compose_quickly
from problems import QUIET, classes, classification, network
from torch import nn

import fedsim
from fedsim.errors import ConfigError, FedsimError
from fedsim.run.unread import limit_cohort, say
from fedsim.server.weightsfile import BEST
from strategies.fedavg import FedAvg


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (lambda x, generator: None, r"returned None, expected \d+ samples.*is there a return"),
        (lambda x, generator: x[:1], r"returned 1 samples, expected"),
    ],
)
def test_an_augmentation_that_returns_something_else_is_named(augment: Any, said: str) -> None:
    with pytest.raises(FedsimError, match=said):
        classification().run("rounds=1", augment=augment)


def test_callbacks_get_copies() -> None:
    class Meddles(fedsim.Callback):
        def round(self, info: fedsim.RoundInfo) -> None:
            info.row.clear()
            info.history.clear()

    class MeddlesToo:
        def round(self, row: Any, clients: Any) -> None:
            row.clear()

    plain = classification().run("rounds=2", "evaluation.every=1")
    result = classification().run("rounds=2", "evaluation.every=1", callbacks=[Meddles(), MeddlesToo()])
    drop = {"seconds"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in result.rows] == [
        {k: v for k, v in r.items() if k not in drop} for r in plain.rows
    ]


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        (
            "weights.safetensors",
            lambda p: p.write_bytes(b"junk"),
            "weights.safetensors is (damaged|not the file)",
        ),
        (
            "metrics.jsonl",
            lambda p: p.write_text(""),
            "metrics.jsonl is damaged: it ends with round 0, but 1",
        ),
        ("metrics.jsonl", lambda p: p.unlink(), "metrics.jsonl cannot be read"),
    ],
)
def test_damaged_folders_are_named(name: str, harm: Any, said: str, tmp_path: Path) -> None:
    classification().run("rounds=1", f"dir={tmp_path}")
    harm(tmp_path / name)
    for again in (
        lambda: classification().run("rounds=1", f"dir={tmp_path}"),
        lambda: fedsim.load_run(tmp_path, model=classification().model),
    ):
        with pytest.raises(FedsimError, match=said):
            again()


def test_a_damaged_best_round_is_named(tmp_path: Path) -> None:
    (tmp_path / BEST).write_bytes(b"junk")
    with pytest.raises(FedsimError, match=r"weights_best.safetensors is damaged"):
        fedsim.RunResult(tmp_path, {}, {}, []).best_weights()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"strategy": FedAvg}, r"hand over an object, FedAvg\(server_lr=..., weighting=...\)"),
        ({"model": nn.Linear}, "model: Linear cannot be called without arguments"),
        ({"model": 3}, "model: got int, expected an nn.Module"),
        ({"cohorts": [0, 1]}, r"cohorts\[0\]=0: expected a list of client ids"),
        ({"cohorts": [[0.5], [1]]}, r"cohorts\[0\]=\[0.5\]: expected"),
        (
            {"initial": nn.Linear(1, 1)},
            r"initial: got Linear, expected a state dict; hand over initial=module.state",
        ),
        ({"initial": "w.pt"}, "initial: got str, expected a state dict"),
    ],
)
def test_parts_of_another_kind_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classification().run("rounds=1", **given)


def test_initial_weights_that_are_nan_are_named() -> None:
    state = {k: v.clone() for k, v in classification().model.state_dict().items()}
    name = next(iter(state))
    state[name][0] = torch.nan
    with pytest.raises(ConfigError, match=f"initial: '{name}' holds NaN"):
        classification().run("rounds=1", initial=state)


def test_settings_beside_what_was_handed_over_in_their_place_are_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    typed = [
        "strategy=scaffold",
        "strategy.server_lr=0.5",
        "model=mlp",
        "partition=iid",
        "num_clients=5",
        "model.head=0",
    ]
    handed = {"strategy": FedAvg(server_lr=1.0, weighting="samples"), "model": 1, "clients": [1, 2]}
    say(compose_quickly(typed), typed, handed)
    said = [r.getMessage().partition(":")[0] for r in caplog.records]
    assert said == ["strategy", "strategy.server_lr", "model", "partition", "num_clients=5"]


def test_a_load_of_nothing_and_a_client_of_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="load_run: got NoneType"):
        fedsim.load_run(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="client='0': give its number"):
        classification().run("rounds=1").model(client="0")  # type: ignore[arg-type]


def test_fewer_clients_than_the_default_cohort_all_take_part_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    four = {"model": network(), "clients": classes((5, 6, 7, 8)), "test": classes((9,), seed=1)[0]}
    result = fedsim.simulate(["engine=serial", *QUIET, "rounds=1", "client.batch_size=4"], **four)
    assert sorted(result.rows[0]["cohort"]) == [0, 1, 2, 3]
    said = [r.getMessage() for r in caplog.records]
    assert said == ["clients_per_round=4: all clients, since there are fewer than its default, 5"]
    with pytest.raises(ConfigError, match=r"clients_per_round=5: must be between 1 and num_clients \(4\)"):
        fedsim.simulate(["engine=serial", "clients_per_round=5"], **four)


def test_settings_alone_limit_the_default_cohort_too() -> None:
    for typed, said in (
        (["num_clients=4"], True),
        (["num_clients=4", "clients_per_round=5"], False),
        ([], False),
    ):
        config = compose_quickly(typed)
        assert bool(limit_cohort(config, typed)) == said
        assert config.clients_per_round == (4 if said else 5)


def test_a_run_that_measures_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    classification(test=None).run("rounds=1")
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["nothing is measured"]
    caplog.clear()
    classification(test=None).run("rounds=1", "evaluation.holdout=0.3", "evaluation.clients_every=1")
    assert not caplog.records
