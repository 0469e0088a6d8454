"""FixMatch, UDA, SemiFL and FedMatch: golden losses, and clients' rounds against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import GOLDEN
from semi import CLASSES, FEATURES, job, numbers, parts, softmax, tilted, weights
from torch import Tensor, nn

from clients.fedmatch import FedMatchClient, fedmatch_loss
from clients.fixmatch import FixMatchClient, UDAClient, fixmatch, uda
from clients.semifl import SemiFLClient, semifl_loss
from clients.sgd import SGDClient
from fedsim.exchange.payload import Refusal
from fedsim.rng import numpy_rng
from strategies.fedmatch import nearest


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "ssl.npz") as z:
        return {k: torch.tensor(v) for k, v in z.items()}


def test_fixmatch_and_uda_are_golden() -> None:
    z = golden()
    for prefix, loss in (
        ("fix", lambda s: fixmatch(z["z_weak"], s, float(z["tau"]))),
        ("uda", lambda s: uda(z["z_weak"], s, float(z["tau"]), float(z["T"]))),
    ):
        strong = z["z_strong"].clone().requires_grad_()
        found = loss(strong)
        (g,) = torch.autograd.grad(found.loss, strong)
        assert found.loss.item() == pytest.approx(float(z[f"{prefix}_loss"]), abs=1e-10)
        assert found.mask.tolist() == z[f"{prefix}_mask"].bool().tolist()
        torch.testing.assert_close(g, z[f"{prefix}_grad"], rtol=0, atol=1e-10)
    assert fixmatch(z["z_weak"], z["z_strong"], float(z["tau"])).label.tolist() == z["fix_label"].tolist()
    cold = uda(z["z_weak"], z["z_strong"], float(z["tau"]), 1e-4)
    warm = fixmatch(z["z_weak"], z["z_strong"], float(z["tau"]))
    assert float(cold.loss) == pytest.approx(float(warm.loss), abs=1e-6)


def test_semifl_is_golden() -> None:
    z = golden()
    first, second = semifl_loss(z["z_strong"], z["z_mix"], z["y_fix"], z["y_mix"], float(z["lam"]))
    assert float(first) == pytest.approx(float(z["semifl_fix"]), abs=1e-10)
    assert float(second) == pytest.approx(float(z["semifl_mix"]), abs=1e-10)
    assert float(first + second) == pytest.approx(float(z["semifl_sum"]), abs=1e-10)
    _, whole = semifl_loss(z["z_strong"], z["z_mix"], z["y_fix"], z["y_mix"], 1.0)
    assert float(whole) == pytest.approx(
        float(torch.nn.functional.cross_entropy(z["z_mix"], z["y_fix"])), abs=1e-12
    )


def test_fedmatch_is_golden_with_helpers_and_without() -> None:
    z = golden()
    for kind, helpers in (("two", z["helpers"]), ("none", z["helpers"][:0])):
        found = fedmatch_loss(
            z["z_weak"],
            z["z_strong"],
            helpers,
            z["sigma"],
            z["psi"],
            lam_i=0.01,
            lam_a=0.5,
            lam_1=1e-4,
            lam_2=10.0,
        )
        assert found.loss.item() == pytest.approx(float(z[f"fedmatch_{kind}_loss"]), abs=1e-10)
        assert found.keep.nonzero().flatten().tolist() == z[f"fedmatch_{kind}_keep"].tolist()
        assert found.label[found.keep].tolist() == z[f"fedmatch_{kind}_label"].tolist()


def test_the_nearest_clients_help_and_of_equals_the_lower_id() -> None:
    embeddings = torch.tensor([[0.0, 0], [1, 0], [0, 1], [5, 5], [5, 6]])
    found = nearest([2, 3, 7, 8, 9], embeddings, 2)
    assert found == [[3, 7], [2, 7], [2, 3], [9, 3], [8, 7]]
    assert nearest([4, 6], embeddings[:2], 2) == [[6], [4]]


# -- steps by hand ------------------------------------------------------------------------------------------------

FIX: dict[str, Any] = {
    "weighting": "samples",
    "tau": 0.6,
    "lam": 0.7,
    "mu": 2,
    "labeller": "local",
    "weak": "weak",
    "strong": "strong",
}


def fixmatch_by_hand(
    w: tuple[np.ndarray, np.ndarray], labelled: int, x: np.ndarray, y: np.ndarray, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Two passes over the labelled samples in batches of 3, with batches of 6 beside; UDA with a temperature."""
    a, b = (part.copy() for part in w)
    eye, own = np.eye(CLASSES), x[labelled:]
    first = 2 * [(xs, ys) for xs, ys in zip(parts(x[:labelled]), parts(y[:labelled]), strict=True)]
    beside = (4 * parts(own, 6))[: len(first)] if labelled else 2 * parts(own, 6)
    for i, us in enumerate(beside):
        teacher = (w[0], w[1]) if options["labeller"] == "global" else (a, b)
        z = us @ teacher[0].T + teacher[1]
        p = softmax(z)
        mask = p.max(1) >= options["tau"]
        t = softmax(z / options["temperature"]) if "temperature" in options else eye[p.argmax(1)]
        shown = tilted(torch.tensor(us), None).numpy()
        dz = (softmax(shown @ a.T + b) - t) * mask[:, None] * options["lam"] / len(us)
        da, db = dz.T @ shown, dz.sum(0)
        if labelled:
            xs, ys = first[i]
            dz = (softmax(xs @ a.T + b) - eye[ys]) / len(xs)
            da, db = da + dz.T @ xs, db + dz.sum(0)
        a, b = a - 0.2 * da, b - 0.2 * db
    return a - w[0], b - w[1]


@pytest.mark.parametrize("labelled", [5, 0], ids=["both", "unlabelled alone"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tau": 0.8}, {"lam": 2.0}, {"labeller": "global"}, {"temperature": 0.4}, {"temperature": 1.0}],
    ids=str,
)
def test_fixmatch_and_uda_steps_by_hand(changes: dict[str, Any], labelled: int) -> None:
    def found(more: dict[str, Any]) -> Any:
        one = job(labelled, 10)
        kind = UDAClient if "temperature" in more else FixMatchClient
        return one, kind(**{**FIX, **more}).fit(one)

    one, update = found(changes)
    x, y = numbers(labelled + 10, 1)
    expected = fixmatch_by_hand(weights(one, one.anchor), labelled, x, y, {**FIX, **changes})
    for ours, theirs in zip(weights(one, update.arrays["delta"]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)
    assert update.weight == labelled + 10 and update.metrics["pseudo/kept"] > 0
    if changes and (labelled or "labeller" not in changes):
        assert not torch.allclose(update.arrays["delta"], found({})[1].arrays["delta"], rtol=0, atol=1e-6)


def test_a_nan_is_dropped_and_counted() -> None:
    one = job(5, 10)
    one.source.dataset.train.x[7] = torch.nan  # type: ignore[union-attr]
    update = FixMatchClient(**FIX).fit(one)
    assert torch.isfinite(update.arrays["delta"]).all() and update.metrics["pseudo/nan"] > 0


SEMIFL: dict[str, Any] = {
    "weighting": "uniform",
    "tau": 0.6,
    "alpha": 0.75,
    "weak": "weak",
    "strong": "strong",
}


def test_semifl_steps_by_hand() -> None:
    """With its own draws of D_m and l; labels are those of the received model in every epoch."""
    one = job(0, 10)
    a, b = start = weights(one, one.anchor)
    x, _ = numbers(10, 1)
    p = softmax(x @ a.T + b)
    y, eye = p.argmax(1), np.eye(CLASSES)
    fixed = np.flatnonzero(p.max(1) >= 0.6)
    assert 3 < len(fixed) < 10
    mixed = torch.randint(10, (len(fixed),), generator=one.rng("mixed")).numpy()
    shares = numpy_rng(0, "semifl/shares", 0, 0)
    for at, other in zip(2 * parts(fixed), 2 * parts(mixed), strict=True):
        share = shares.beta(0.75, 0.75)
        strong = tilted(torch.tensor(x[at]), None).numpy()
        both = share * x[at] + (1 - share) * x[other]
        dz = (softmax(strong @ a.T + b) - eye[y[at]]) / len(at)
        dm = (softmax(both @ a.T + b) - share * eye[y[at]] - (1 - share) * eye[y[other]]) / len(at)
        a, b = a - 0.2 * (dz.T @ strong + dm.T @ both), b - 0.2 * (dz + dm).sum(0)
    update = SemiFLClient(**SEMIFL).fit(one)
    for ours, end, before in zip(weights(one, update.arrays["delta"]), (a, b), start, strict=True):
        np.testing.assert_allclose(ours, end - before, atol=1e-10)
    assert update.metrics["pseudo/kept"] == len(fixed) and update.weight == 1
    with pytest.raises(Refusal, match=r"none of its 10 samples has a pseudo label of at least 1.0"):
        SemiFLClient(**{**SEMIFL, "tau": 1.0}).fit(job(0, 10))


MATCH: dict[str, Any] = {
    "weighting": "samples",
    "confidence": 0.6,
    "lam_s": 2.0,
    "lam_i": 0.3,
    "lam_a": 0.4,
    "lam_1": 1e-2,
    "lam_2": 0.5,
    "mu": 2,
    "strong": "strong",
    "embeds": False,
}


def match_job(labelled: int, helpers: bool = True) -> Any:
    generator = torch.Generator().manual_seed(4)
    size = len(job(1, 1).anchor)
    psi, theirs = (torch.randn(*s, size, generator=generator, dtype=torch.float64) for s in ((), (2,)))
    real = job(1, 1).layout.expand(torch.ones(job(1, 1).layout.size, dtype=torch.float64))
    sent = {"psi": 0.3 * psi * real} | ({"helpers": 0.5 * theirs * real} if helpers else {})
    return job(labelled, 10, message=sent)


@pytest.mark.parametrize("labelled", [5, 0], ids=["both", "unlabelled alone"])
@pytest.mark.parametrize("helpers", [True, False])
def test_fedmatch_steps_by_hand(labelled: int, helpers: bool) -> None:
    """sigma by labelled batches of 3, psi by 6 unlabelled samples after each; a linear model in numpy."""
    one = match_job(labelled, helpers)
    arrays, o = one.message.arrays, MATCH
    psi = list(weights(one, arrays["psi"]))
    first = weights(one, one.anchor)
    sigma = [t - s for t, s in zip(first, psi, strict=True)]
    theirs = [[s + h for s, h in zip(sigma, weights(one, v), strict=True)] for v in arrays.get("helpers", ())]
    x, y = numbers(labelled + 10, 1)
    eye, own = np.eye(CLASSES), x[labelled:]
    steps = 2 * list(zip(parts(x[:labelled]), parts(y[:labelled]), strict=True))
    beside = (4 * parts(own, 6))[: len(steps)] if labelled else 2 * parts(own, 6)
    for i, us in enumerate(beside):
        if labelled:
            xs, ys = steps[i]
            dz = o["lam_s"] * (softmax(xs @ (sigma[0] + psi[0]).T + sigma[1] + psi[1]) - eye[ys]) / len(xs)
            sigma = [sigma[0] - 0.2 * dz.T @ xs, sigma[1] - 0.2 * dz.sum(0)]
        a, b = sigma[0] + psi[0], sigma[1] + psi[1]
        p, ps = softmax(us @ a.T + b), [softmax(us @ h[0].T + h[1]) for h in theirs]
        keep = p.max(1) >= o["confidence"]
        label = np.array([np.bincount([q[j].argmax() for q in (p, *ps)]).argmax() for j in range(len(us))])
        g = [-2 * o["lam_2"] * (s - q) + o["lam_1"] * np.sign(q) for s, q in zip(sigma, psi, strict=True)]
        if n := keep.sum():
            shown = tilted(torch.tensor(us), None).numpy()[keep]
            dz = o["lam_a"] * (softmax(shown @ a.T + b) - eye[label[keep]]) / n
            du = sum((o["lam_i"] * (p - q)[keep] / n / len(ps) for q in ps), np.zeros((n, CLASSES)))
            g = [g[0] + dz.T @ shown + du.T @ us[keep], g[1] + (dz + du).sum(0)]
        psi = [q - 0.2 * d for q, d in zip(psi, g, strict=True)]
    update = FedMatchClient(**MATCH).fit(one)
    for ours, s, q, before in zip(weights(one, update.arrays["delta"]), sigma, psi, first, strict=True):
        np.testing.assert_allclose(ours, s + q - before, atol=1e-10)
    start = weights(one, arrays["psi"])
    for ours, q, before in zip(weights(one, update.arrays["psi"]), psi, start, strict=True):
        np.testing.assert_allclose(ours, q - before, atol=1e-10)
    assert update.metrics["pseudo/kept"] > 0


def test_with_batchnorm_a_single_unlabelled_sample_moves_nothing_and_two_do() -> None:
    def update(unlabelled: int) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))
        sizes = job(6, unlabelled, model=model)
        sent = {"psi": torch.zeros_like(sizes.anchor)}
        one = job(6, unlabelled, model=model, message=sent)
        return dict(FedMatchClient(**{**MATCH, "confidence": 0.0}).fit(one).arrays)

    one, two = update(1), update(2)
    assert one["delta"].any() and not one["psi"].any() and two["psi"].any()


def test_without_its_weights_fedmatch_trains_sigma_alone() -> None:
    none = dict.fromkeys(("lam_i", "lam_a", "lam_1", "lam_2"), 0.0)
    one = match_job(5)
    update = FedMatchClient(**{**MATCH, **none, "lam_s": 1.0}).fit(one)
    assert not update.arrays["psi"].any()
    plain = SGDClient(weighting="samples").fit(job(5, 10))
    torch.testing.assert_close(update.arrays["delta"], plain.arrays["delta"], rtol=0, atol=1e-12)
