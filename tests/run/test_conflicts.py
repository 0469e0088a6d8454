"""Settings that do not go together are told before data are read or workers start, and leave no folder behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from problems import classification, network
from torch import nn

import fedsim
from fedsim.api import run
from fedsim.errors import ConfigError, DataError

FLEET = "system=lognormal"
RING = "topology=ring"
CONFLICTS = [  # settings, the beginning of the line
    ("topology=ring", "topology: FedAvg talks through a server; leave topology out, or type strategy=gossip"),
    ("strategy=gossip", "topology: this method's peers need a graph; type topology=ring"),
    ("strategy=fedasync", "strategy: an asynchronous method needs devices that take different times"),
    (f"strategy=gossip_async {RING} {FLEET}", "system: asynchronous peers have times of their own"),
    ("strategy=fedsgd", "client.steps=None: clients of FedSGD send one gradient a round; add client.steps=1"),
    (f"strategy=fedbuff {FLEET} system.over_selection=2", "system.over_selection: an asynchronous server waits for"),
    (f"strategy=fedasync {FLEET} aggregator=flag", "aggregator: strategy=fedasync hears one client at a time"),
    ("strategy=heterofl aggregator=flag", "aggregator: parts of models can only be averaged"),
    ("strategy=local_only aggregator=flag", "aggregator: LocalOnly averages no vectors here"),
    ("strategy=fedproto strategy.share=prototypes aggregator=flag", "aggregator: FedProto averages no vectors here"),
    ("strategy=centralised aggregator=flag", "aggregator: all samples lie in one place, so there is one update"),
    (f"strategy=gossip {RING} aggregator=flag", "aggregator: under strategy.target=received one hostile model"),
    ("strategy=dpsgd topology=time_varying", "strategy.mixing=metropolis: needs an undirected graph"),
    ("strategy=centralised attack=sign_flip", "attack: Centralised has all samples in one place"),
    ("strategy=centralised client.classes=[{share:1}]", "client.classes: Centralised has all samples in one place"),
    ("sampling=staying", "sampling=staying: needs devices that come and go; add system=phones"),
    (f"strategy=fedbuff {FLEET} sampling=power_of_choice", "sampling=power_of_choice: an asynchronous method has no"),
    ("client.classes=[{share:1,width:0.5}]", "client.classes: a width needs a method that trains parts"),
    ("client.classes=[{share:1}] client.classes_by=speed", "client.classes_by=speed: needs devices"),
    ("client.classes=[1]", "client.classes[0]=1: must be like"),
    ("attack=sign_flip attack.fraction=0.01", "attack.fraction=0.01: of num_clients=20 that is nobody; give at least 0.05"),
    ("attack=sign_flip attack.scale=0", "attack.scale=0: must be positive"),
    ("attack=cat_map attack.augment.p=2", "augment.p=2: must be in [0, 1]"),
    (f"{FLEET} system.stragglers=drop", "system.stragglers=drop: needs system.deadline"),
    ("strategy.server_lr=-1", "strategy.server_lr=-1: must be positive"),
    ("strategy=fedloge strategy.sse.sparsity=1", "strategy.sse.sparsity=1: must be in [0, 1)"),
    ("strategy=ggeur strategy.base=scaffold", "strategy.base=scaffold: must be a strategy; type strategy@strategy.base"),
    ("data.subset=many", "data.subset=many: must be a whole number, or null"),
    ("model.hidden=200", "model.hidden=200: must be a list, each a whole number"),
    ("encoder=random_cnn encoder.width=wide", "encoder.width=wide: must be a number"),
    ("partition.sampled=maybe", "partition.sampled=maybe: must be true or false"),
]  # fmt: skip


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading data or starting an engine fails the test."""

    def too_late(*given: Any) -> None:
        raise AssertionError("data were read, or an engine started, before the conflict was told")

    monkeypatch.setattr("fedsim.api.load_data", too_late)
    monkeypatch.setattr("fedsim.api.start_engine", too_late)


@pytest.mark.parametrize(("overrides", "line"), CONFLICTS)
def test_a_conflict_is_told_first(overrides: str, line: str, no_data: None) -> None:
    with pytest.raises(ConfigError) as caught:
        run(compose_quickly(("engine=serial", *overrides.split())))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert not Path("runs").exists()


# -- what only data and model tell ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("strategy=fedbn", "strategy: FedBN keeps BatchNorm with its clients, but Network has no such layer"),
        ("strategy=silobn", "strategy: SiloBN keeps BatchNorm with its clients, but Network has no such layer"),
        ("buffers=local", "buffers=local: says what BatchNorm does, but Network has no such layer; leave buffers out"),
        ("buffers=all_local", "buffers=all_local: says what BatchNorm does, but Network has no such layer"),
    ],
)
def test_a_policy_for_batchnorm_needs_batchnorm(overrides: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        classification().run(*overrides.split())
    assert str(caught.value).startswith(line)
    assert not Path("runs").exists()
    classification("bn", model=network("bn")).run(*overrides.split(), "rounds=1")


def test_methods_with_a_policy_of_their_own_do_without_batchnorm() -> None:
    assert classification().run("strategy=local_only", "buffers=local", "rounds=1").rows


def test_a_run_refused_for_its_data_leaves_what_was_there() -> None:
    Path("runs/default").mkdir(parents=True)
    Path("runs/default/note.txt").touch()
    with pytest.raises(DataError):
        fedsim.simulate(["engine=serial", "data=parquet", "data.path=nowhere.parquet", "dir=runs/default/new/deep"])
    assert [str(p) for p in Path("runs").rglob("*")] == ["runs/default", "runs/default/note.txt"]


def test_a_run_that_failed_in_a_round_keeps_its_folder() -> None:
    class Late(nn.Linear):
        calls = 0

        def forward(self, x: Any) -> Any:
            Late.calls += 1
            if Late.calls > 60:
                raise ConfigError("late")
            return super().forward(x)

    with pytest.raises(Exception, match="late"):
        classification(model=Late(4, 3)).run("dir=kept", "evaluation.every=1", "rounds=20")
    assert Path("kept/metrics.jsonl").read_text()


@pytest.mark.parametrize("place", ["dir=/dev/null/x", "out=/dev/null/x"])
def test_a_folder_that_cannot_be_made(place: str) -> None:
    with pytest.raises(ConfigError, match=r"^/dev/null/x.*: cannot be written \(Not a directory\); give another"):
        classification().run(place)
