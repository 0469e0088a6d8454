"""Personalised and long-tail baselines: one client and full batches, against plain torch written from the equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import Problem, classes, classification, hashes, network, recorded
from torch.nn import functional as F

from clients.etf import simplex_etf
from fedsim.errors import ConfigError
from fedsim.task.heads import HeadSlots
from fedsim.task.layout import Layout

LR = 0.1
ONE = ("rounds=1", "clients_per_round=1", "dtype=float64", "client.epochs=3", "client.batch_size=20",
       "client.weight_decay=0", "client.clip_norm=null", "client.lr_decay=1")  # fmt: skip
MEASURED = ("evaluation.clients_every=1", "evaluation.local_test=true", "evaluation.by_class=true")


def problem(**changes):
    return Problem(network(), classes((17,)), ONE, test=classes((40,), seed=1)[0], **changes)


def data():
    x, y = classes((17,))[0]
    return x.double(), y


def descend(parameters, loss, steps=3):
    """Gradient descent in place on ``loss()``."""
    for _ in range(steps):
        grads = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= LR * g


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-12)


def test_fine_tuning_goes_on_from_the_global_model_and_leaves_no_trace():
    result = problem().run("strategy=fedavg_ft", "strategy.finetune_epochs=2", *MEASURED)
    plain = problem().run("strategy=fedavg")
    assert hashes(result) == hashes(plain)
    model, (x, y) = network().double(), data()
    for p, value in zip(model.parameters(), result.weights.values(), strict=True):
        p.data.copy_(value)
    test_x, test_y = problem().test
    rows = np.load(result.dir / "local_test.npz")["index"]

    def right():
        return float((model(test_x[rows].double()).argmax(1) == test_y[rows]).double().mean())

    before = right()
    descend(list(model.parameters()), lambda: F.cross_entropy(model(x), y), steps=2)
    row = result.rows[-1]
    assert row["clients/global/accuracy"] == pytest.approx(before)
    assert row["clients/accuracy"] == pytest.approx(right())
    loss = F.cross_entropy(model(test_x[rows].double()), test_y[rows])
    assert row["clients/loss"] == pytest.approx(float(loss.detach()))


def test_dittos_personal_model_by_hand_over_two_turns():
    strategy, result = recorded("ditto", problem(), "strategy.lam=0.7", "rounds=2", *MEASURED)
    plain, _ = recorded("fedavg", problem(), "rounds=2")
    (x, y), v = data(), network().double()
    w = flat(v)
    for turn in range(2):
        close(strategy.states[turn]["w"], plain.states[turn]["w"])
        start = [
            part.view(p.shape)
            for part, p in zip(w.split([p.numel() for p in v.parameters()]), v.parameters(), strict=True)
        ]

        def loss(start=start):
            pull = sum(((p - s) ** 2).sum() for p, s in zip(v.parameters(), start, strict=True))
            return F.cross_entropy(v(x), y) + 0.35 * pull

        descend(list(v.parameters()), loss)
        close(strategy.kept[turn][0]["v"], flat(v))
        w = strategy.states[turn]["w"]
    test_x, test_y = problem().test
    rows = np.load(result.dir / "local_test.npz")["index"]
    expected = (v(test_x[rows].double()).argmax(1) == test_y[rows]).double().mean()
    assert result.rows[-1]["clients/accuracy"] == pytest.approx(float(expected))
    assert "clients/global/accuracy" in result.rows[-1]


def test_without_the_pull_dittos_personal_model_is_local_training():
    problem_ = classification(cohorts=[range(6)] * 4)
    strategy, _ = recorded("ditto", problem_, "strategy.lam=0", "client.shuffle=false")
    alone, _ = recorded("local_only", problem_, "client.shuffle=false")
    for mine, theirs in zip(strategy.kept[-1], alone.kept[-1], strict=True):
        torch.testing.assert_close(mine["v"], theirs["w"], rtol=0, atol=1e-6)


def test_dittos_personal_statistics_are_its_own():
    strategy, _ = recorded("ditto", classification("bn"), "rounds=2")
    plain, _ = recorded("fedavg", classification("bn"), "rounds=2")
    assert torch.equal(strategy.states[-1]["buffers"], plain.states[-1]["buffers"])
    kept = [k for k in strategy.kept[-1] if k]
    assert kept and all(not torch.equal(k["v/buffers"], strategy.states[-1]["buffers"]) for k in kept)


def test_each_phase_begins_with_an_optimiser_at_rest():
    """Adam's moments of Ditto's personal steps must not reach the shared model; FedRep's phases differ in size."""
    problem = classification()
    assert hashes(problem.run("strategy=ditto", "client=adam")) == hashes(problem.run("client=adam"))
    run, _ = recorded("fedrep", problem, "client=adam", "rounds=1")
    assert bool(torch.isfinite(run.states[0]["w"]).all())
    assert not torch.equal(run.states[0]["w"], recorded("fedrep", problem, "rounds=1")[0].states[0]["w"])


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_heads_stay_with_their_clients(name):
    strategy, result = recorded(name, classification(), *MEASURED, "client.weight_decay=0")
    initial = network().state_dict()
    for key in ("2.weight", "2.bias"):
        assert torch.equal(result.weights[key], initial[key])
    assert not torch.equal(result.weights["0.weight"], initial["0.weight"])
    heads = [k["local/0"] for k in strategy.kept[-1] if k]
    assert all(len(h) == 18 for h in heads) and not torch.equal(heads[0], heads[1])
    assert result.rows[-1]["clients/accuracy"] > result.rows[-1].get("accuracy", 0) - 1


def test_fedper_by_hand_over_two_turns():
    strategy, _ = recorded("fedper", problem(), "rounds=2")
    (x, y), model = data(), network().double()
    descend(list(model.parameters()), lambda: F.cross_entropy(model(x), y), steps=6)
    close(strategy.states[-1]["w"][:25], flat(model)[:25])
    close(strategy.kept[-1][0]["local/0"], flat(model)[25:])


def test_fedrep_trains_the_head_then_the_body():
    strategy, _ = recorded(
        "fedrep", problem(), "strategy.head_epochs=2", "rounds=2", "client.weight_decay=0.1"
    )
    (x, y), model = data(), network().double()
    body, head = list(model.parameters())[:2], list(model.parameters())[2:]

    def loss(part):
        return lambda: F.cross_entropy(model(x), y) + 0.05 * sum((p**2).sum() for p in part)

    for _ in range(2):
        descend(head, loss(head), steps=2)
        descend(body, loss(body), steps=3)
    close(strategy.states[-1]["w"][:25], flat(model)[:25])
    close(strategy.kept[-1][0]["local/0"], flat(model)[25:])


def test_fedrods_two_heads_by_hand():
    strategy, result = recorded("fedrod", problem(), *MEASURED)
    (x, y), model = data(), network().double()
    shift = (torch.bincount(y, minlength=3).double() / 17).log()
    private = strategy.kept[-1][0]["phi"]

    def heads(v):
        return v[:15].view(3, 5), v[15:]

    start = HeadSlots.of(Layout(model)).fresh(0, "private head", 0).requires_grad_()
    for _ in range(3):
        h = model.features(x)
        logits = model.head(h)
        weight, bias = heads(start)
        side = F.cross_entropy(logits.detach() + h.detach() @ weight.T + bias, y)
        balanced = F.cross_entropy(logits + shift, y)
        grads = torch.autograd.grad(balanced, list(model.parameters()))
        own = torch.autograd.grad(side, start)[0]
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= LR * g
            start -= LR * own
    close(strategy.states[-1]["w"], flat(model))
    close(private, start.detach())
    test_x, test_y = problem().test
    rows = np.load(result.dir / "local_test.npz")["index"]
    h = model.features(test_x[rows].double())
    weight, bias = heads(start)
    expected = ((model.head(h) + h @ weight.T + bias).argmax(1) == test_y[rows]).double().mean()
    assert result.rows[-1]["clients/accuracy"] == pytest.approx(float(expected))


def test_fedrod_measures_the_received_body_with_the_head_of_the_last_turn():
    """Client 0 trains in round 0 alone: its head is of then, body and shared head are of round 1."""
    data = classes((17, 9))
    two = Problem(network(), data, ONE, test=classes((40,), seed=1)[0], cohorts=[[0], [1]])
    strategy, result = recorded("fedrod", two, "rounds=2", *MEASURED)
    private, w = strategy.kept[1][0]["phi"], strategy.states[1]["w"]
    close(private, strategy.kept[0][0]["phi"])
    assert not torch.equal(w, strategy.states[0]["w"])
    model = network().double()
    torch.nn.utils.vector_to_parameters(w, model.parameters())
    saved = np.load(result.dir / "local_test.npz")
    rows = saved["index"][: saved["offsets"][1]]  # client 0's
    x, y = two.test[0][rows].double(), two.test[1][rows]
    h = model.features(x)
    logits = model.head(h) + h @ private[:15].view(3, 5).T + private[15:]
    expected = float(F.cross_entropy(logits, y).detach())
    table = result.per_client
    mine = table.query("client == 0 and metric == 'evaluate/loss'").value.tolist()
    assert mine[-1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gamma", [0, 1])
def test_fedetf_by_hand(gamma):
    options = ("strategy.temperature=4", f"strategy.gamma={gamma}", "client.weight_decay=0.1")
    strategy, result = recorded("fedetf", problem(), *options, "strategy.seed=7")
    (x, y), model = data(), network().double()
    frame = 4 * simplex_etf(3, 5, seed=7)
    shift = gamma * (torch.bincount(y, minlength=3).double() / 17).log()
    body = list(model.parameters())[:2]

    def loss():
        logits = F.normalize(model.features(x)) @ frame.T + shift
        return F.cross_entropy(logits, y) + 0.05 * sum((p**2).sum() for p in body)

    descend(body, loss)
    close(strategy.states[-1]["w"], flat(model))  # the idle head as it was: decay is not sent
    close(result.weights["2.weight"], frame)
    close(result.weights["2.bias"], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("prior", ["client", "all"])
def test_adjusted_logits_by_hand(prior):
    clients = [
        *classes((17,)),
        (torch.randn(5, 4), torch.tensor([0, 0, 2, 2, 2])),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]
    cohorts = [[0], [0]]
    both = Problem(network(), clients, ONE, test=classes((40,), seed=1)[0], cohorts=cohorts)
    options = (f"strategy.prior={prior}", "strategy.tau=0.5", "rounds=2")
    strategy, result = recorded("logit_adjust", both, *options)
    (x, y), model = data(), network().double()
    counted = torch.bincount(y, minlength=3) + (torch.tensor([2, 0, 3]) if prior == "all" else 0)
    shift = 0.5 * (counted.double() / counted.sum()).log()
    descend(list(model.parameters()), lambda: F.cross_entropy(model(x) + shift, y), steps=6)
    close(strategy.states[-1]["w"], flat(model))
    up = [row["bytes_up"] for row in result.rows]
    assert up[0] - up[1] == (3 * (3 * 8 + 8) if prior == "all" else 0)  # three clients' counts, once


def test_a_class_that_a_client_has_not_costs_it_nothing():
    """Its adjusted logit is minus infinity: no gradient, no NaN."""
    clients = [
        (torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])),
        (torch.randn(6, 4), torch.tensor([2] * 6)),
    ]
    for name in ("logit_adjust", "fedrod", "fedetf"):
        shared = Problem(network(), clients, ("rounds=2", "clients_per_round=2"))
        result = shared.run(f"strategy={name}", "failures.nonfinite=stop")
        assert all(torch.isfinite(v).all() for v in result.weights.values())


def test_methods_of_shared_features_need_a_model_that_shows_them():
    for name in ("fedper", "fedrep", "fedrod", "fedetf"):
        with pytest.raises(ConfigError, match=r"model\.features"):
            classification(model=torch.nn.Linear(4, 3)).run(f"strategy={name}")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("ditto", "lam=-1"),
        ("fedavg_ft", "finetune_epochs=0"),
        ("fedrep", "head_epochs=0"),
        ("fedetf", "temperature=0"),
        ("fedetf", "gamma=-1"),
        ("logit_adjust", "tau=-1"),
        ("logit_adjust", "prior=server"),
    ],
)
def test_impossible_options_are_named(name, option):
    with pytest.raises(ConfigError, match=f"strategy.{option}"):
        classification().run(f"strategy={name}", f"strategy.{option}")
