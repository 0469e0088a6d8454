"""FedSTO: a client's round of either phase in plain torch, float64, and what whole runs promise."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from problems import classes, classification, guessed_losses, hashes, method, network
from semi import FEATURES, job, numbers, parts
from torch import Tensor, nn

from clients.detector_parts import DetectorParts
from clients.fedsto import FedSTOClient
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.labelled import Labelled
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Refusal

SERVER = "data.labelled={at: server, count: 30, per_class: false}"
TOY = (
    "strategy.decode._target_=problems.guessed_boxes",
    "strategy.losses.path=problems.guessed_losses",
    "strategy.backbone=0.*",
    "strategy.strong=[]",
    "strategy.weak=null",
    "strategy.lo=0.35",
    "strategy.hi=0.4",
)


# -- a client's round ---------------------------------------------------------------------------------------------


def body() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers = [nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
        model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in model.parameters():
            p *= 2.5  # so that some guesses are sure
    return model


def client(**changes: Any) -> FedSTOClient:
    options = {k: changes[k] for k in changes if k not in ("lam", "norm", "alpha")}
    words = [f"strategy.{k}={v}" for k, v in changes.items() if k in ("lam", "norm", "alpha")]
    built = method("fedsto", *TOY, *words).client
    return FedSTOClient(**{**vars(built), **options})


def by_hand(
    selective: bool, alpha: float, lam: float, lo: float, hi: float
) -> tuple[nn.Module, list[Tensor]]:
    """Two passes in batches of 3 with plain torch: the student, and the teacher's weights."""
    student, weights = body(), {"class": 0.3, "objectness": 0.7, "box": 1.0}
    teacher = [p.detach().clone() for p in student.parameters()]
    trained = list(student[0].parameters()) if selective else list(student.parameters())
    other = body()
    for xs in 2 * parts(numbers(10, 1)[0]):
        x = torch.tensor(xs)
        with torch.no_grad():
            for p, t in zip(other.parameters(), teacher, strict=True):
                p.copy_(t)
            score, label = other(x).softmax(1).max(1)
        obj, place = score.sqrt(), score[:, None, None].expand(-1, 1, 4)
        high = score >= hi
        y = {
            "boxes": place,
            "labels": torch.where(score >= lo, label, -1)[:, None],
            "objectness": torch.where(score >= lo, obj, 0.0)[:, None],
            "classed": high[:, None],
            "boxed": (high | (obj > 0.99) & (score >= lo))[:, None],
        }
        found = guessed_losses(student(x), y)
        loss = sum(weights[k] * found[k].mean() for k in weights)
        if not selective and lam:
            for layer in (student[2], student[4]):
                s = torch.linalg.svdvals(layer.weight)
                worst = (s.square() - 1).abs().max()
                square = layer.weight.shape[0] == layer.weight.shape[1]
                loss = loss + lam * (worst + (worst if square else worst.clamp(min=1)))
        grads = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for p, g in zip(trained, grads, strict=True):
                p -= 0.2 * g
            for t, p in zip(teacher, student.parameters(), strict=True):
                t.copy_(alpha * t + (1 - alpha) * p)
    return student, teacher


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_a_clients_round_by_hand(selective: bool, lam: float) -> None:
    one = job(0, 10, "client.weight_decay=0", message={}, model=body())
    one.message = type(one.message)(one.message.arrays, {"selective": selective})
    rule = client(lam=lam, alpha=0.8, hi=0.6)
    update = rule.fit(one)
    student, teacher = by_hand(selective, 0.8, lam, rule.lo, rule.hi)
    start = torch.cat([p.flatten() for p in body().parameters()])
    moved = torch.cat([p.detach().flatten() for p in student.parameters()]) - start
    sent = update.arrays["backbone"] if selective else one.layout.compact(update.arrays["delta"])
    assert set(update.arrays) == {"backbone" if selective else "delta"} and update.weight == 10
    torch.testing.assert_close(sent, moved[: 5 * FEATURES + 5] if selective else moved, rtol=0, atol=1e-12)
    kept = one.layout.compact(update.state["teacher"])
    torch.testing.assert_close(kept, torch.cat([t.flatten() for t in teacher]), rtol=0, atol=1e-12)
    assert update.metrics["pseudo/images"] == 20 and 0 < update.metrics["pseudo/classed"] < 20
    if selective:  # neck and head are as they came, bit for bit
        assert not one.layout.compact(one.model.w)[5 * FEATURES + 5 :].any()


def test_weight_decay_and_momentum_leave_neck_and_head_alone_too() -> None:
    one = job(0, 10, "client.weight_decay=0.1", "client.momentum=0.9", "client.clip_norm=0.5", model=body())
    one.message = type(one.message)(one.message.arrays, {"selective": True})
    client().fit(one)
    moved = one.layout.compact(one.model.w)  # where the delta is worked out
    assert not moved[5 * FEATURES + 5 :].any() and moved[: 5 * FEATURES + 5].all()


def test_without_any_box_the_client_refuses_and_a_carried_teacher_goes_on() -> None:
    def turn(rule: FedSTOClient, state: dict[str, Tensor]) -> Any:
        one = job(0, 10, model=body())
        one.message, one.state = type(one.message)(one.message.arrays, {"selective": False}), state
        return rule.fit(one)

    with pytest.raises(Refusal, match=r"no box of at least 1.0 in 20 images"):
        turn(client(lo=1.0), {})
    first = turn(client(), {})
    again, carried = turn(client(), dict(first.state)), turn(client(carry=True), dict(first.state))
    assert torch.equal(again.state["teacher"], first.state["teacher"])
    assert not torch.equal(carried.state["teacher"], first.state["teacher"])


# -- runs ---------------------------------------------------------------------------------------------------------

SIZES = (20, 30, 25, 40, 22, 31)


def run(*settings: str, name: str = "fedsto", kind: str = "tanh", **changes: Any) -> Any:
    toy = [*TOY, "strategy.warmup_rounds=1"]
    problem = classification(kind, clients=classes(SIZES), **changes)
    return problem.run(f"strategy={name}", *toy, SERVER, *settings)


def test_the_phase_switches_on_time_and_after_a_resume(tmp_path: Any) -> None:
    saved = [
        f"dir={tmp_path / 'run'}",
        "checkpoint.every=1",
        "strategy.selective_rounds=2",
        "client.momentum=0.5",
    ]
    whole = run("strategy.selective_rounds=2", "client.momentum=0.5")
    count = 5 * FEATURES + 5
    assert [r["bytes_up"] for r in whole.rows] == [
        3 * (4 * n + 8) for n in (count, count, count + 18, count + 18)
    ]
    run(*saved, "rounds=1")
    found = run(*saved)
    assert hashes(found) == hashes(whole)
    assert hashes(run("strategy.selective_rounds=3", "client.momentum=0.5"))[:2] == hashes(whole)[:2]


def test_without_omega_and_a_first_phase_it_is_the_baseline() -> None:
    bare = run("strategy.selective_rounds=0", "strategy.lam=0")
    assert (
        hashes(bare)
        == hashes(run(name="pseudo_ema"))
        != hashes(run("strategy.selective_rounds=0", "strategy.lam=1"))
    )


def test_labels_of_clients_samples_change_no_bit() -> None:
    given = classes(SIZES)
    x, y = (torch.cat([c[i] for c in given]) for i in (0, 1))
    data = Dataset(Samples(x, y), classes=tuple("abc"))
    known = Labelled("server", count=30, per_class=False).of_server(data, np.arange(len(y)), 0)
    hidden = np.setdiff1d(np.arange(len(y)), known)
    y[hidden] = (y[hidden] + 1) % 3
    poisoned = list(zip(x.split(SIZES), y.split(SIZES), strict=True))
    every = {"cohorts": [range(6)] * 4}
    settings = ("strategy=fedsto", *TOY, "strategy.warmup_rounds=1", SERVER, "strategy.selective_rounds=2")
    before, after = (classification(clients=c, **every).run(*settings) for c in (given, poisoned))
    assert hashes(before) == hashes(after)
    assert 0 < before.rows[-1]["pseudo/class_share"] <= 1 == before.rows[-1]["pseudo/place_share"] >= 0


def test_statistics_outside_the_backbone_are_used_and_stay() -> None:
    """BatchNorm, the layer ``1``, is in evaluation mode where the backbone is ``0`` alone."""
    model = network("bn").double()

    def after(*patterns: str) -> Any:
        one = job(0, 12, model=copy.deepcopy(model))
        one.message = type(one.message)(one.message.arrays, {"selective": True})
        update = client(parts=DetectorParts(patterns)).fit(one)
        return one.model.buffers, update.arrays["backbone"], one.message.arrays["buffers"]

    held, sent, received = after("0.*")
    assert torch.equal(held, received) and len(sent) == 25
    assert not torch.equal(after("0.*", "1.*")[0], received)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("strategy.backbone=body.*", "strategy.backbone: 'body.*' matches no parameter"),
        ("strategy.backbone=*", "no weight matrix is left outside it"),
        ("strategy.alpha=often", "alpha"),
        ("strategy.hi=0.2", "0 < lo <= hi <= 1"),
        ("+strategy.weights.mask=1", "class, objectness, box"),
        ("strategy.decode.score=0.4", "must be below strategy.lo"),
        ("strategy.norm=frobenius", "exact, power"),
    ],
)
def test_refusals(changed: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("*", r"\*").replace("<", "<")):
        run(changed)


@pytest.mark.nightly
def test_options_change_what_they_should() -> None:
    usual = run("strategy.selective_rounds=2", "strategy.lam=0.1")
    for changed in (
        "strategy.alpha=auto",
        "strategy.norm=power",
        "strategy.teacher=carry",
        "strategy.sure=0.5",
    ):
        other = run("strategy.selective_rounds=2", "strategy.lam=0.1", changed)
        assert hashes(usual)[-1] != hashes(other)[-1], changed
    assert network()(torch.zeros(1, 4)).shape == (1, 3)
