"""FedLoGe against the authors' code, and what it promises about what travels, what stays and what is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fedloge_runs import OWN, TESTS, run
from problems import GOLDEN, Network, Problem, Recorded, classes, classification, method, network, recorded
from torch import nn
from torch.nn import functional as F

from clients.fedloge import FedLoGeClient
from fedsim.server.clientmetrics import over_clients
from fedsim.server.examiner import Examiner
from fedsim.task.heads import Head


@dataclass(frozen=True, kw_only=True)
class Given(FedLoGeClient):
    """With the golden heads instead of drawn ones."""

    z: dict

    def classifier(self, num_classes, dim):
        return Head(torch.tensor(self.z["sse_W"]), torch.tensor(self.z["sse_b"]))

    def private(self, job):
        if job.state:
            return super().private(job)
        weight, bias = (torch.tensor(self.z[f"phi_{n}0_{job.client}"]) for n in "Wb")
        return torch.cat([weight.reshape(-1), bias])


@pytest.mark.filterwarnings("ignore:sparsity")
def test_one_round_of_the_authors_code():
    with np.load(GOLDEN / "fedloge_stage1.npz") as file:
        z = dict(file)
    model = Network(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    initial = {"0.weight": z["A0"], "0.bias": z["a0"], "2.weight": z["psi_W0"], "2.bias": z["psi_b0"]}
    clients = [(torch.tensor(z[f"X{k}"]), torch.tensor(z[f"y{k}"])) for k in range(3)]
    inner = method("fedloge")
    inner.client = Given(**vars(inner.client), z=z)
    strategy = Recorded(inner)
    settings = (
        "rounds=1",
        "dtype=float64",
        "client.lr=0.03",
        "client.momentum=0.5",
        "client.epochs=5",
        "client.batch_size=10",
        "client.shuffle=false",
        "client.weight_decay=0",
        "client.clip_norm=null",
        "clients_per_round=3",
    )
    problem = Problem(model, clients, settings, initial={k: torch.tensor(v) for k, v in initial.items()})
    result = problem.run(strategy=strategy)
    w = strategy.states[-1]["w"]
    expected = np.concatenate([z[n].reshape(-1) for n in ("A_glob", "a_glob", "psi_W_glob", "psi_b_glob")])
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-12)
    for k in range(3):
        phi = np.concatenate([z[f"phi_W_{k}"].reshape(-1), z[f"phi_b_{k}"]])
        np.testing.assert_allclose(strategy.kept[-1][k]["phi"], phi, rtol=0, atol=1e-12)
        row = result.per_client.query("client == @k and metric == 'train_loss'")
        assert row.value.item() == pytest.approx(float(z[f"loss_{k}"]), abs=1e-12)
    realigned = 1.7 * F.normalize(torch.tensor(z["psi_W_glob"]), dim=1)
    np.testing.assert_allclose(result.weights["2.weight"], realigned, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.weights["2.bias"], z["psi_b_glob"], rtol=0, atol=1e-12)


# -- what travels, what stays -------------------------------------------------------------------------------------


def numbers(strategy, at=-1):
    """Body and head sizes of the little network: 4-5-3."""
    return 4 * 5 + 5, 3 * 5 + 3


@pytest.mark.filterwarnings("ignore:sparsity")
def test_private_heads_stay_and_the_second_stage_costs_no_communication():
    strategy, result = run(classification(), *TESTS)
    _, silent = run(classification())
    body, head = numbers(strategy)
    for row, other in zip(result.rows, silent.rows, strict=True):
        assert row["bytes_up"] == 3 * (4 * (body + head) + 8)  # the shared model and the weight: no phi
        assert row["bytes_down"] == 3 * 4 * (body + head)
        assert (row["bytes_up"], row["bytes_down"]) == (other["bytes_up"], other["bytes_down"])
        assert row["weights_hash"] == other["weights_hash"]
    assert all(k.keys() <= {"phi"} and (not k or len(k["phi"]) == head) for k in strategy.kept[-1])


@pytest.mark.filterwarnings("ignore:sparsity")
def test_features_do_not_learn_from_the_heads_nor_the_heads_from_each_other():
    """Other starts of psi and other private heads: the body goes the same way; S is never trained."""

    @dataclass(frozen=True, kw_only=True)
    class Elsewhere(FedLoGeClient):
        def private(self, job):
            return super().private(job) + 1

    one, _ = run(classification(), "rounds=2")
    other = method("fedloge", *OWN)
    classifier = other.sse.head(3, 5)
    before = classifier.weight.clone()
    other.client = Elsewhere(**vars(other.client))
    model = network()
    with torch.no_grad():
        model.head.weight.mul_(-3)
    two = Recorded(other)
    classification(model=model).run("rounds=2", *OWN[1:], strategy=two)
    body = numbers(one)[0]
    assert torch.equal(one.states[-1]["w"][:body], two.states[-1]["w"][:body])
    assert not torch.equal(one.states[-1]["w"][body:], two.states[-1]["w"][body:])
    assert torch.equal(other.sse.head(3, 5).weight, before)
    assert not classifier.weight.requires_grad
    trained = [k["phi"] for k in one.kept[-1] if k]
    shifted = [k["phi"] for k in two.kept[-1] if k]
    assert not any(torch.equal(a, b) for a, b in zip(trained, shifted, strict=True))


@pytest.mark.filterwarnings("ignore:sparsity")
def test_with_train_head_the_shared_model_is_that_of_fedavg():
    mine, _ = recorded("fedloge", classification(), "strategy.train=head")
    theirs, _ = recorded("fedavg", classification())
    torch.testing.assert_close(mine.states[-1]["w"], theirs.states[-1]["w"], rtol=0, atol=1e-6)


# -- what is measured ---------------------------------------------------------------------------------------------


def heads_of(strategy, client):
    """Body and heads as numpy: (A, a), (psi W, b), (phi W, b)."""
    w = strategy.states[-1]["w"].double().numpy()
    a, b, v, c = np.split(w, [20, 25, 40])
    phi = strategy.kept[-1][client].get("phi")
    own = None if phi is None else (phi[:15].double().numpy().reshape(3, 5), phi[15:].double().numpy())
    return (a.reshape(5, 4), b), (v.reshape(3, 5), c), own


@pytest.mark.filterwarnings("ignore:sparsity")
@pytest.mark.parametrize("policy", ["test", "train"])
def test_all_variants_against_plain_numpy(policy):
    """Global ones on the whole test set, personal ones on every client's part, classes it has not masked."""
    test = classes((60,), seed=1)[0]
    problem = classification(test=test, cohorts=[range(6)] * 2)
    strategy, result = run(problem, *TESTS, "rounds=2", f"strategy.mask={policy}")
    x, y = (t.double().numpy() if t.is_floating_point() else t.numpy() for t in test)
    (a, b), (v, c), _ = heads_of(strategy, 0)
    h = np.tanh(x @ a.T + b)
    s = method("fedloge", *OWN).sse.head(3, 5).weight.numpy()
    lengths = np.linalg.norm(v, axis=1, keepdims=True)
    row = result.rows[-1]
    variants = {"": (1.7 * v / lengths, c), "plain/": (v, c), "no_bias/": (v / lengths, 0), "sse/": (s, 0)}
    for name, (weight, bias) in variants.items():
        right = (h @ weight.T + bias).argmax(1) == y
        assert row[f"{name}accuracy"] == pytest.approx(right.mean(), abs=1e-12)
        by_class = [right[y == k].mean() for k in range(3)]
        assert row[f"{name}class_accuracy"] == pytest.approx(by_class, abs=1e-12)
    with np.load(result.dir / "local_test.npz") as stored:
        parts = np.split(stored["index"], stored["offsets"][1:-1])
    table = result.per_client.query("round == 2").set_index(["client", "metric"]).value
    for k, rows in enumerate(parts):
        if not len(rows):
            continue
        _, _, (p, q) = heads_of(strategy, k)
        held = np.bincount(problem.clients[k][1], minlength=3)
        allowed = held if policy == "train" else np.bincount(y[rows], minlength=3)
        summed = h[rows] @ (np.linalg.norm(p, axis=1, keepdims=True) * v + p).T + c + q
        for name, logits in (
            ("", np.where(allowed > 0, summed, -np.inf)),
            ("phi/", h[rows] @ p.T + q),
            ("phi_psi/", h[rows] @ (p + v).T + c + q),
        ):
            expected = (logits.argmax(1) == y[rows]).mean()
            assert table[k, f"evaluate/{name}accuracy"] == pytest.approx(expected, abs=1e-12)
    own = [table[k, "evaluate/accuracy"] for k, rows in enumerate(parts) if len(rows)]
    sizes = [len(problem.clients[k][1]) for k, rows in enumerate(parts) if len(rows)]
    assert row["clients/accuracy"] == pytest.approx(np.mean(own))
    assert row["clients/accuracy_weighted"] == pytest.approx(np.average(own, weights=sizes))
    assert row["clients/accuracy_std"] == pytest.approx(np.std(own))
    assert row["clients/accuracy_worst_tenth"] == min(own)


@pytest.mark.filterwarnings("ignore:sparsity")
def test_the_test_set_passes_through_the_body_once_a_round(monkeypatch):
    """Four global and eighteen personal classifiers from one pass; clients compute no features of their own."""
    calls = []
    inner = Examiner._over_test
    monkeypatch.setattr(Examiner, "_over_test", lambda self, *a: (calls.append(a[0]), inner(self, *a))[1])
    monkeypatch.setattr("clients.heads.features", None)
    run(classification(test=classes((60,), seed=1)[0]), *TESTS)
    assert calls == ["features"] * 4


@pytest.mark.filterwarnings("ignore:sparsity")
def test_features_looked_up_and_features_computed_give_the_same():
    """The same samples as the clients' own: once from the shared test set, once held out by the client."""
    strategy, result = run(classification("bn", test=classes((50,), seed=1)[0]), *TESTS)
    assert len(strategy.kept[-1])
    inner = method("fedloge", *OWN)
    inner.evaluate_clients = lambda server, state: over_clients(  # without the features in the message
        server.exchange(inner.message(state, server.round), {}, task="evaluate", clients=range(6)).ok,
        server.sizes,
    )
    again = classification("bn", test=classes((50,), seed=1)[0]).run(*TESTS, *OWN[1:], strategy=inner)
    for row, other in zip(result.rows, again.rows, strict=True):
        for name in ("clients/accuracy", "clients/phi/accuracy", "clients/macro_f1"):
            assert row[name] == pytest.approx(other[name], abs=1e-12)


@pytest.mark.filterwarnings("ignore:sparsity")
@pytest.mark.parametrize("policy", ["local", "all_local"])
def test_features_of_their_own_where_statistics_stay_with_clients(policy):
    _, result = run(classification("bn", test=classes((50,), seed=1)[0]), *TESTS, f"buffers={policy}")
    assert result.rows[-1]["clients/accuracy"] > 0


@pytest.mark.filterwarnings("ignore:sparsity")
def test_the_final_weights_are_the_realigned_model():
    strategy, result = run(classification())
    lengths = result.weights["2.weight"].norm(dim=1)
    np.testing.assert_allclose(lengths, 1.7, rtol=1e-6)
    assert torch.equal(result.weights["2.bias"], strategy.states[-1]["w"][-3:])
