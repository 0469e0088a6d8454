"""FedSTO: its equations and steps against float64 forms of their own, and what whole runs promise."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import classes, classification, guessed_losses, hashes, method, network
from semi import FEATURES, job, numbers, parts
from torch import Tensor, nn

from clients.fedsto import FedSTOClient, Parts, auto_alpha, ema, route
from clients.orthogonal import omega, orthogonality, starting
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.labelled import Labelled
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Refusal
from fedsim.models.boxes import ciou
from fedsim.models.detector import part_losses

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


def spectral(theta: np.ndarray) -> float:
    """Omega by singular values of both Gram matrices."""
    a, b = theta.T @ theta - np.eye(theta.shape[1]), theta @ theta.T - np.eye(theta.shape[0])
    return float(np.linalg.norm(a, 2) + np.linalg.norm(b, 2))


@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (6, 2, 3, 3), (40, 3, 1, 1)])
def test_omega_and_its_gradient(shape: tuple[int, ...], scale: float) -> None:
    theta = scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta.requires_grad_()
    value = omega(theta)
    matrix = theta.detach().flatten(1).numpy()
    assert value.item() == pytest.approx(spectral(matrix), rel=1e-12)
    (found,) = torch.autograd.grad(value, theta)
    u, s, v = np.linalg.svd(matrix)
    i = int(np.abs(s**2 - 1).argmax())
    one = 2 * s[i] * np.sign(s[i] ** 2 - 1) * np.outer(u[:, i], v[i])
    square, large = matrix.shape[0] == matrix.shape[1], abs(s[i] ** 2 - 1) > 1
    np.testing.assert_allclose(found.flatten(1), one * (2 if square or large else 1), atol=1e-12)


def test_least_values_of_omega() -> None:
    assert omega(torch.eye(4, dtype=torch.float64)).item() == 0
    assert omega(torch.eye(4, 7, dtype=torch.float64)).item() == 1


def test_power_iteration_reaches_the_norm_if_it_goes_on_and_not_in_one_step() -> None:
    thetas = {"a": torch.randn(30, 50, dtype=torch.float64), "b": 0.1 * torch.randn(20, 6, 3, 3).double()}
    exact = orthogonality(thetas).item()
    assert exact == pytest.approx(sum(spectral(t.flatten(1).numpy()) for t in thetas.values()))
    vectors = starting(thetas, torch.Generator().manual_seed(0))
    first = orthogonality(thetas, vectors, steps=1).item()
    for _ in range(80):
        last = orthogonality(thetas, vectors).item()
    assert first < 0.95 * exact and last == pytest.approx(exact, rel=1e-5)


def test_what_boxes_count_for() -> None:
    score = torch.tensor([0.05, 0.1, 0.59, 0.6, 0.95, 0.3])
    objectness = torch.tensor([0.5, 0.2, 0.99, 0.7, 1.0, 0.995])
    found = route(score, objectness, 0.1, 0.6)
    assert found.classed.tolist() == [False, False, False, True, True, False]
    assert found.boxed.tolist() == [False, False, False, True, True, True]
    torch.testing.assert_close(found.objectness, torch.tensor([0, 0.2, 0.99, 0.7, 1.0, 0.995]))


def test_the_teacher_follows() -> None:
    teacher, points = torch.tensor([1.0, -2.0]).double(), torch.randn(6, 2).double()
    expected = 0.9**6 * teacher + sum(0.1 * 0.9 ** (5 - i) * p for i, p in enumerate(points))
    for p in points:
        ema(teacher, p, 0.9)
    torch.testing.assert_close(teacher, expected, rtol=0, atol=1e-14)
    assert auto_alpha(156) == pytest.approx(0.999, abs=1e-4) and auto_alpha(7) ** 7 == pytest.approx(0.86)


def ciou_by_hand(a: list[float], b: list[float]) -> float:
    (ax, ay, aX, aY), (bx, by, bX, bY) = a, b
    inner = max(0, min(aX, bX) - max(ax, bx)) * max(0, min(aY, bY) - max(ay, by))
    iou = inner / ((aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - inner)
    c2 = (max(aX, bX) - min(ax, bx)) ** 2 + (max(aY, bY) - min(ay, by)) ** 2
    d2 = ((ax + aX - bx - bX) / 2) ** 2 + ((ay + aY - by - bY) / 2) ** 2
    v = 4 / math.pi**2 * (math.atan((bX - bx) / (bY - by)) - math.atan((aX - ax) / (aY - ay))) ** 2
    return iou - d2 / c2 - (v**2 / (1 - iou + v) if v else 0)


def test_ciou_by_hand() -> None:
    pairs = [([0, 0, 4, 2], [1, 1, 3, 6]), ([0, 0, 2, 2], [5, 5, 6, 9]), ([1, 1, 3, 4], [1, 1, 3, 4])]
    found = ciou(*(torch.tensor([p[k] for p in pairs], dtype=torch.float64) for k in (0, 1)))
    np.testing.assert_allclose(found, [ciou_by_hand(a, b) for a, b in pairs], atol=1e-9)


def test_losses_of_a_detectors_cells() -> None:
    """Two boxes in one image, of which the second trains objectness alone; none in the other image."""
    torch.manual_seed(0)
    output = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    boxes = torch.tensor([[[3.0, 5, 13, 15], [20, 18, 30, 28]], [[0.0] * 4] * 2], dtype=torch.float64)
    y = {
        "boxes": boxes,
        "labels": torch.tensor([[2, 0], [-1, -1]]),
        "objectness": torch.tensor([[0.9, 0.4], [0.7, 0.7]], dtype=torch.float64),
        "classed": torch.tensor([[True, False], [True, True]]),
        "boxed": torch.tensor([[True, False], [True, True]]),
    }
    found, z = part_losses(output, y), output.flatten(2).transpose(1, 2)
    wanted, mine = torch.zeros(2, 64, dtype=torch.float64), list[int]()
    for cell in range(64):
        x, down = 4 * (cell % 8) + 2, 4 * (cell // 8) + 2
        if math.hypot(x - 8, down - 10) <= 3.6:
            wanted[0, cell] = 0.9
            mine.append(cell)
        elif math.hypot(x - 25, down - 23) <= 3.6:
            wanted[0, cell] = 0.4
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(found["objectness"], bce(z[..., 0], wanted, reduction="none").mean(1))
    one_hot = torch.tensor([[0.0, 0, 1]] * len(mine), dtype=torch.float64)
    assert len(mine) == 2 and (wanted == 0.4).any()
    torch.testing.assert_close(found["class"][0], bce(z[0, mine, 1:4], one_hot))
    sides = 4 * F.softplus(z[0, mine, 4:]).numpy()
    centres = [(4 * (c % 8) + 2, 4 * (c // 8) + 2) for c in mine]
    off = [
        1 - ciou_by_hand([x - a, d - b, x + c, d + e], [3, 5, 13, 15])
        for (x, d), (a, b, c, e) in zip(centres, sides, strict=True)
    ]
    assert found["box"][0].item() == pytest.approx(np.mean(off), rel=1e-9)
    assert found["class"][1] == found["box"][1] == 0


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
        update = client(parts=Parts(patterns)).fit(one)
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
