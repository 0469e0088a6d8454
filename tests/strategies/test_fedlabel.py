"""FedLabel against an independent float64 form in numpy, written from the equations; its edges and what it logs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import classes, classification, hashes, network
from semi import CLASSES, LABELLED, NOISE, job, numbers, parts, softmax, tilted, weights

from clients.fedlabel import FedLabelClient, confidence, fedlabel_loss, select
from clients.sgd import SGDClient
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Refusal, Update
from strategies.fedavg import FedAvg

DEFAULTS: dict[str, Any] = {
    "weighting": "used",
    "beta": 0.5,
    "lam0": 1.0,
    "confidence": "variance",
    "kl": "teacher_student",
    "kl_input": "strong",
    "denominator": "kept",
    "view": "strong",
    "unlabelled_steps": None,
    "teachers": "both",
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 0.8},
    {"lam0": 0.0},
    {"lam0": 2.0},
    {"confidence": "entropy"},
    {"confidence": "logit_variance"},
    {"kl": "student_teacher"},
    {"kl_input": "plain"},
    {"denominator": "batch", "beta": 0.8},
    {"unlabelled_steps": 2},
    {"view": "weak"},
    {"teachers": "local"},
    {"teachers": "global"},
]


def client(**changes: Any) -> FedLabelClient:
    return FedLabelClient(**{**DEFAULTS, **changes})


# -- the equations again, in numpy --------------------------------------------------------------------------------


def sureness(z: np.ndarray, kind: str) -> np.ndarray:
    p = softmax(z)
    if kind == "variance":
        return ((p - 1 / z.shape[1]) ** 2).mean(1)
    if kind == "entropy":
        return np.log(z.shape[1]) + (p * np.log(p)).sum(1)
    return ((z - z.mean(1, keepdims=True)) ** 2).mean(1)


def chosen_by_hand(z_g: np.ndarray, z_l: np.ndarray, beta: float, lam0: float, kind: str) -> dict[str, Any]:
    out: dict[str, Any] = {k: [] for k in ("label", "keep", "from_global", "agree", "strength", "other")}
    for g, own in zip(z_g, z_l, strict=True):
        h_g, h_l = sureness(g[None], kind)[0], sureness(own[None], kind)[0]
        best, other, ratio = (g, own, h_l / h_g) if h_g > h_l else (own, g, h_g / h_l if h_l else 1.0)
        p, q = softmax(best), softmax(other)
        y, keep = int(p.argmax()), bool(p.max() > beta)
        agree = keep and int(q.argmax()) == y
        found = (y, keep, h_g > h_l, agree, lam0 * ratio if agree else 0.0, q)
        for name, value in zip(out, found, strict=True):
            out[name].append(value)
    return {k: np.array(v) for k, v in out.items()}


def divergence_gradient(q: np.ndarray, other: np.ndarray, kl: str) -> np.ndarray:
    """Of KL(other || q) or KL(q || other) with respect to the logits of q (n, C)."""
    if kl == "teacher_student":
        return q - other
    apart = np.log(q) - np.log(other)
    return q * (apart - (q * apart).sum(1, keepdims=True))


def round_by_hand(
    w: tuple[np.ndarray, np.ndarray],
    labelled: int,
    x: np.ndarray,
    y: np.ndarray,
    options: dict[str, Any],
    lr: float = 0.2,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Both branches of a linear model; two passes in batches of 3. The summed moves, and how many were kept."""
    (a, b), eye = (part.copy() for part in w), np.eye(CLASSES)
    a0, b0 = w
    for _ in range(2):
        for xs, ys in zip(parts(x[:labelled]), parts(y[:labelled]), strict=True):
            dz = (softmax(xs @ a.T + b) - eye[ys]) / len(xs)
            a, b = a - lr * dz.T @ xs, b - lr * dz.sum(0)
    u, v, total = a0.copy(), b0.copy(), 0
    batches = 2 * parts(x[labelled:])
    for xs in batches[: options["unlabelled_steps"]]:
        pair = {"global": xs @ a0.T + b0, "local": xs @ a.T + b}
        both, one = options["teachers"] == "both", options["teachers"]
        first, second = pair.values() if both else (pair[one], pair[one])
        lam0 = options["lam0"] if both else 0.0
        found = chosen_by_hand(first, second, options["beta"], lam0, options["confidence"])
        keep = found["keep"]
        if not keep.any():
            continue
        total += keep.sum()
        n = len(xs) if options["denominator"] == "batch" else keep.sum()
        shown = xs if options["view"] == "weak" else tilted(torch.tensor(xs), None).numpy()
        shown, plain = shown[keep], xs[keep]
        label, strength, other = (found[k][keep] for k in ("label", "strength", "other"))
        q = softmax(shown @ u.T + v)
        pairs = [((q - eye[label]) / n, shown)]
        seen = plain if options["kl_input"] == "plain" else shown
        dz = divergence_gradient(softmax(seen @ u.T + v), other, options["kl"]) * strength[:, None] / n
        pairs.append((dz, seen))
        u, v = (
            u - lr * sum(d.T @ at for d, at in pairs),
            v - lr * sum(d.sum(0) for d, _ in pairs),
        )
    moved = (u - a0, v - b0)
    return moved[0] + (a - a0), moved[1] + (b - b0), int(total)


@pytest.mark.parametrize("kind", ["variance", "entropy", "logit_variance"])
def test_which_teacher_is_chosen_and_what_it_says(kind: str) -> None:
    z = torch.tensor(np.random.default_rng(0).normal(size=(2, 40, 5)) * 1.5)
    z[:, 0] = z[0, 0]  # the same teachers: the local one
    z[:, 1] = 0  # nobody knows anything
    found = select(z[0], z[1], beta=0.4, lam0=0.7, kind=kind)
    expected = chosen_by_hand(z[0].numpy(), z[1].numpy(), 0.4, 0.7, kind)
    for name in ("label", "keep", "from_global", "agree"):
        assert getattr(found, name).tolist() == expected[name].tolist(), name
    np.testing.assert_allclose(found.strength, expected["strength"], atol=1e-10)
    np.testing.assert_allclose(found.other.exp(), expected["other"], atol=1e-10)
    np.testing.assert_allclose(confidence(z[0], kind), sureness(z[0].numpy(), kind), atol=1e-10)
    assert not found.from_global[:2].any() and float(found.strength[0]) == (0.7 if found.keep[0] else 0)
    loose = select(z[0], z[1], beta=0.1, lam0=0.7, kind=kind)
    assert float(loose.strength[1]) == 0.7  # both uniform: ratio 1
    assert 0 < int(found.from_global.sum()) < 40 and 0 < int(found.agree.sum()) < int(found.keep.sum()) < 40


def test_confidences_choose_differently_and_lie_in_their_bounds() -> None:
    z = torch.tensor(np.random.default_rng(1).normal(size=(2, 400, 5)) * 3)
    picks = {k: select(z[0], z[1], kind=k).from_global for k in ("variance", "entropy", "logit_variance")}
    assert (picks["variance"] != picks["logit_variance"]).sum() > 20
    assert (picks["variance"] != picks["entropy"]).any()
    sure = torch.tensor([[100.0, 0, 0, 0]], dtype=torch.float64)
    assert float(confidence(sure)) == pytest.approx(3 / 16) and float(confidence(sure * 0)) == 0
    assert float(confidence(sure, "entropy")) == pytest.approx(math.log(4))


@pytest.mark.parametrize("kl", ["teacher_student", "student_teacher"])
def test_loss_and_gradient(kl: str) -> None:
    rng = np.random.default_rng(2)
    z_g, z_l, z = (rng.normal(size=(12, 5)) * 1.5 for _ in range(3))
    chosen = select(torch.tensor(z_g), torch.tensor(z_l), beta=0.0)
    student = torch.tensor(z, requires_grad=True)
    loss = fedlabel_loss(student, chosen, kl=kl, count=20)
    (g,) = torch.autograd.grad(loss, student)
    hand = chosen_by_hand(z_g, z_l, 0.0, 1.0, "variance")
    q, eye = softmax(z), np.eye(5)
    first, second = (hand["other"], q) if kl == "teacher_student" else (q, hand["other"])
    rows = -np.log(q[np.arange(12), hand["label"]])
    rows = rows + hand["strength"] * (first * np.log(first / second)).sum(1)
    assert float(loss) == pytest.approx(rows.sum() / 20, abs=1e-12)
    dz = q - eye[hand["label"]] + hand["strength"][:, None] * divergence_gradient(q, hand["other"], kl)
    np.testing.assert_allclose(g, dz / 20, atol=1e-12)
    assert float(fedlabel_loss(student[:0], chosen.at(torch.arange(0)), kl=kl)) == 0


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_a_clients_round_is_the_one_by_hand(changes: dict[str, Any]) -> None:
    one, options = job(5, 8), {**DEFAULTS, **changes}
    x, y = numbers(13, 1)
    expected = round_by_hand(weights(one, one.anchor), 5, x, y, options)
    before = one.message.arrays["w"].clone()
    update = client(**changes).fit(one)
    found = weights(one, update.arrays["delta"])
    for ours, theirs in zip(found, expected[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)
    assert update.weight == 10 + expected[2] and update.metrics["pseudo/kept"] == expected[2] > 0
    assert torch.equal(before, one.message.arrays["w"])
    if changes:
        usual = client().fit(job(5, 8)).arrays["delta"]
        assert not torch.allclose(usual, update.arrays["delta"], rtol=0, atol=1e-6)


# -- edges --------------------------------------------------------------------------------------------------------


def test_without_one_kind_of_samples() -> None:
    own = client().fit(job(0, 8))
    assert own.metrics["pseudo/from_global"] == 0  # w_L = w: ties go to the local one
    assert own.metrics["pseudo/agree"] == own.metrics["pseudo/kept"] == own.weight
    labelled = client().fit(job(5, 0))
    plain = SGDClient(weighting="samples").fit(job(5, 0))
    assert torch.equal(labelled.arrays["delta"], plain.arrays["delta"]) and labelled.weight == 10
    with pytest.raises(Refusal, match="no samples"):
        client().fit(job(0, 0))
    with pytest.raises(Refusal, match="no pseudo label above beta"):
        client(beta=1.0).fit(job(0, 8))


def test_buffers_are_the_mean_of_both_branches() -> None:
    def statistics(labelled: int, unlabelled: int, rule: Any) -> torch.Tensor:
        one = job(labelled, unlabelled, model=network("bn"))
        rule.fit(one)
        return one.model.buffers.clone()

    plain = statistics(6, 9, SGDClient(weighting="samples"))
    assert torch.equal(statistics(6, 9, client(beta=1.0)), plain)  # a branch without a step has no part
    # everything is kept, whatever its label: statistics of the first layer, whose weights lr=0 leaves alone
    still = ("client.lr=1e-300",)
    one = job(6, 9, *still, model=network("bn"))
    client(beta=0.0).fit(one)
    x = torch.tensor(numbers(15, 1)[0])
    first = network("bn").double()[0]
    branches = []
    for batches in (2 * list(x[:6].split(3)), [tilted(b, None) for b in 2 * list(x[6:].split(3))]):
        mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
        for batch in batches:
            z = first(batch).detach()
            mean, var = 0.9 * mean + 0.1 * z.mean(0), 0.9 * var + 0.1 * z.var(0)
        branches.append((mean, var))
    named = one.layout.named_buffers(one.model.buffers)
    for i, name in enumerate(("1.running_mean", "1.running_var")):
        torch.testing.assert_close(named[name], (branches[0][i] + branches[1][i]) / 2, rtol=0, atol=1e-12)


class UsedClient(SGDClient):
    """FedAvg's, weighed by the samples that its steps saw."""

    def finish(self, job: Any, w: torch.Tensor) -> Update:
        return replace(super().finish(job, w), weight=float(job.meter.samples))


class Used(FedAvg):
    """FedAvg with these."""

    def make_client(self) -> Any:
        return UsedClient(weighting=self.weighting)


@pytest.mark.parametrize("kind", ["tanh", "bn"])
def test_with_beta_1_it_is_fedavg_on_labelled_samples_bit_for_bit(kind: str) -> None:
    problem, more = classification(kind, clients=classes((20, 30, 25, 40, 22, 31))), (LABELLED, *NOISE)
    found = problem.run("strategy=fedlabel", "strategy.beta=1", *more)
    plain = problem.run(*more, strategy=Used(server_lr=1.0, weighting="samples"))
    assert hashes(found) == hashes(plain)
    losses = [r.per_client.query("metric == 'train_loss'").value.tolist() for r in (found, plain)]
    assert losses[0] == losses[1]
    assert found.rows[-1]["pseudo/kept_share"] == 0


def test_samples_used_are_what_clients_weigh() -> None:
    settings = ("rounds=1", "clients_per_round=6", "client.steps=3", "client.batch_size=4")
    problem = classification(clients=classes((20, 30, 25, 40, 22, 31)), settings=settings)
    found = problem.run("strategy=fedlabel", LABELLED, *NOISE).per_client
    table = found.pivot(index="client", columns="metric", values="value")
    used = table["samples"] - table["pseudo/seen"] + table["pseudo/kept"]
    assert table["weight"].tolist() == used.tolist() and table["pseudo/kept"].max() > 0
    assert (table["pseudo/kept"] <= table["pseudo/seen"]).all()
    assert table["samples"].max() == 24  # three steps of four in either branch


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("strategy.beta=1.5", r"strategy.beta=1.5: probabilities"),
        ("strategy.lam0=-1", r"strategy.lam0=-1"),
        ("strategy.confidence=max", r"choose one of variance, entropy, logit_variance"),
        ("strategy.kl=both", r"choose one of teacher_student, student_teacher"),
        ("strategy.kl_input=weak", r"choose one of strong, plain"),
        ("strategy.denominator=all", r"choose one of kept, batch"),
        ("strategy.weighting=kept", r"choose one of used, samples, uniform"),
        ("strategy.teachers=none", r"choose one of both, local, global"),
        ("strategy.unlabelled_steps=0", r"must be at least 1, or null"),
    ],
)
def test_impossible_options_are_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classification().run("strategy=fedlabel", LABELLED, setting)
