"""FedLoGe at the edges of its specification: empty clients, absent classes, single samples, narrow bodies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fedloge_runs import TESTS, run
from problems import Network, Problem, classes, classification, method, network
from torch import nn

from fedsim.errors import ConfigError
from fedsim.models import Linear
from fedsim.task.heads import HeadSlots
from fedsim.task.layout import Slot


def with_clients(*labels):
    """Clients with the given labels, and a test set of all three classes."""
    g = torch.Generator().manual_seed(0)
    clients = [(torch.randn(len(y), 4, generator=g), torch.tensor(y, dtype=torch.long)) for y in labels]
    return classification(clients=clients, test=classes((60,), seed=1)[0], cohorts=[range(len(clients))] * 4)


@pytest.mark.filterwarnings("ignore:sparsity")
def test_empty_clients_are_skipped_and_left_out_of_the_averages():
    everyone = with_clients([0, 1, 2, 0], [], [2, 2, 1, 0])
    strategy, result = run(everyone, *TESTS)
    assert [(f["client"], f["kind"], f["reason"]) for f in result.rows[0]["failures"]] == [
        (1, "refused", "no samples")
    ]
    assert not strategy.kept[-1][1]
    table = result.per_client.query("round == 4 and metric == 'evaluate/accuracy'")
    assert table.client.tolist() == [0, 2]
    assert result.rows[-1]["clients/accuracy"] == pytest.approx(table.value.mean())


@pytest.mark.filterwarnings("ignore:sparsity")
def test_a_client_without_local_tests_trains_but_is_not_measured():
    problem = with_clients([0] * 40 + [1] * 40 + [2] * 20, [1])  # 1/101 of 20 test samples: none
    strategy, result = run(problem, *TESTS)
    assert "phi" in strategy.kept[-1][1]
    measured = result.per_client.query("metric == 'evaluate/accuracy'").client
    assert set(measured) == {0}


@pytest.mark.filterwarnings("ignore:sparsity")
def test_a_client_with_one_class_has_a_personal_model_that_names_it():
    strategy, result = run(with_clients([0, 1, 2, 1], [2, 2, 2, 2]), *TESTS)
    assert torch.isfinite(strategy.kept[-1][1]["phi"]).all()
    table = result.per_client.query("round == 4 and client == 1").set_index("metric").value
    assert table["evaluate/accuracy"] == table["evaluate/macro_f1"] == table["evaluate/weighted_f1"] == 1
    assert table["evaluate/many/accuracy"] == 1 and "evaluate/few/accuracy" not in table


@pytest.mark.parametrize("features", [torch.zeros(6, 5), -torch.ones(6, 5), 1e3 * torch.randn(6, 5)])
def test_masked_classes_are_never_named_whatever_the_features(features):
    """Masking weights by -1e10 would let signed or empty features name them."""
    client = method("fedloge").client
    slots = HeadSlots(Slot("head.weight", (3, 5), 0, 15), None)
    job = SimpleNamespace(
        holdout=SimpleNamespace(
            samples=SimpleNamespace(labels=torch.zeros(6, dtype=torch.long)), index=torch.arange(6)
        ),
        start=lambda: torch.cat([torch.full((10,), 50.0), torch.full((5,), -50.0)]),
        message=SimpleNamespace(arrays={"features": features}),
        state={"phi": torch.tensor([9.0] * 15 + [0.0, 99.0, 99.0])},
        head=slots,
        class_counts=torch.tensor([5, 0, 0]),
        score=lambda logits, y: {"guesses": sorted(set(logits.argmax(1).tolist()))},
    )
    assert client.evaluate(replace_len(job)).metrics["guesses"] == [0]


def replace_len(job):
    class Rows(SimpleNamespace):
        def __len__(self):
            return len(self.index)

    job.holdout = Rows(**vars(job.holdout))
    return job


@pytest.mark.filterwarnings("ignore:sparsity")
def test_a_class_nobody_has_is_reported():
    _, result = run(with_clients([0, 1, 0, 1], [1, 1, 0, 0]), *TESTS)
    assert result.rows[-1]["absent_classes"] == 1
    _, full = run(with_clients([0, 1, 2, 1], [1, 1, 0, 0]), *TESTS)
    assert "absent_classes" not in full.rows[-1]


@pytest.mark.filterwarnings("ignore:sparsity")
def test_clients_measured_before_their_first_turn_are_counted():
    problem = classification(test=classes((60,), seed=1)[0], cohorts=[[0, 1], [1, 2], [3], [0, 4, 5]])
    _, result = run(problem, *TESTS)
    assert [row["clients/untrained"] for row in result.rows] == [4, 3, 2, 0]


def test_a_batch_of_one_sample_is_left_out_under_batch_norm():
    """Nine samples in batches of four: two steps an epoch with BatchNorm, three without; one sample alone: refused."""
    clients = classes((9, 1, 8))
    for kind, steps in (("bn", 2.0), ("tanh", 3.0)):
        problem = Problem(network(kind), clients, ("rounds=1", "clients_per_round=3", "client.batch_size=4"))
        result = problem.run("client.epochs=1")
        table = result.per_client.query("metric == 'steps'").set_index("client").value
        assert table[0] == steps and table[2] == 2
        refused = [(f["client"], f["reason"]) for f in result.rows[0]["failures"]]
        assert refused == ([(1, "one sample, too few for BatchNorm")] if kind == "bn" else [])


def test_a_narrow_body_is_refused_with_what_to_do():
    narrow = Network(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3))
    with pytest.raises(ConfigError, match="dim=2: 3 classes need at least 3 features"):
        classification(model=narrow).run("strategy=fedloge")
    with pytest.raises(ConfigError, match=r"FedLoGe needs model.features.*Linear lacks them"):
        classification(model=nn.Linear(4, 3)).run("strategy=fedloge")
    with pytest.raises(
        ConfigError, match="FedLoGe trains the features; Linear has no parameters beside its head"
    ):
        classification(model=Linear((4,), 3)).run("strategy=fedloge")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("strategy.scale=0", "strategy.scale=0"),
        ("strategy.train=both", "strategy.train=both.*etf, head"),
        ("strategy.mask=none", "strategy.mask=none"),
        ("strategy.sse.bias=yes", "strategy.sse.bias=yes"),
        ("strategy.sse.sparsity=1.5", "sparsity=1.5"),
    ],
)
def test_impossible_options_are_named(override, words):
    with pytest.raises(ConfigError, match=words):
        classification().run("strategy=fedloge", override)
