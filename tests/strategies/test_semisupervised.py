"""FixMatch, UDA, SemiFL and FedMatch against golden numbers and numpy; what methods on unlabelled samples share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import GOLDEN, classes, classification, hashes, method, network, recorded
from semi import CLASSES, LABELLED, NOISE, job, numbers, parts, softmax, tilted, weights
from torch import Tensor

from clients.fedmatch import FedMatchClient, fedmatch_loss
from clients.fixmatch import FixMatchClient, UDAClient, fixmatch, uda
from clients.semifl import SemiFLClient, semifl_loss
from clients.sgd import SGDClient
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.labelled import Labelled
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Outcome, Refusal, Replies
from fedsim.rng import numpy_rng
from strategies.fedmatch import nearest

SERVER = "data.labelled={at: server, count: 30}"
AT_CLIENTS = ("fedlabel", "fixmatch", "uda", "fedmatch")
AT_SERVER = ("semifl", "fixmatch", "uda", "fedmatch", "server_only")
METHODS = [*((m, LABELLED) for m in AT_CLIENTS), *((m, SERVER) for m in AT_SERVER)]
LOOSE = {"fedlabel": "beta", "fedmatch": "confidence"}  # what decides whether a label is kept
each = pytest.mark.parametrize(("name", "setting"), METHODS, ids=lambda v: str(v).partition("{at: ")[2] or v)


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "ssl.npz") as z:
        return {k: torch.tensor(v) for k, v in z.items()}


def loose(name: str) -> list[str]:
    """So that untrained models keep some labels."""
    return [] if name == "server_only" else [f"strategy.{LOOSE.get(name, 'tau')}=0.35"]


def problem(**changes: Any) -> Any:
    return classification(clients=classes((20, 30, 25, 40, 22, 31)), **changes)


def run(name: str, *settings: str, **changes: Any) -> Any:
    return problem(**changes).run(f"strategy={name}", *NOISE, *loose(name), *settings)


# -- losses -------------------------------------------------------------------------------------------------------


def test_fixmatch_and_uda_are_golden() -> None:
    z = golden()
    for prefix, loss in (
        ("fix", lambda s: fixmatch(z["z_weak"], s, float(z["tau"]))),
        ("uda", lambda s: uda(z["z_weak"], s, float(z["tau"]), float(z["T"]))),
    ):
        strong = z["z_strong"].clone().requires_grad_()
        found = loss(strong)
        (g,) = torch.autograd.grad(found.loss, strong)
        assert float(found.loss) == pytest.approx(float(z[f"{prefix}_loss"]), abs=1e-10)
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
        assert float(found.loss) == pytest.approx(float(z[f"fedmatch_{kind}_loss"]), abs=1e-10)
        assert found.keep.tolist() == z[f"fedmatch_{kind}_keep"].bool().tolist()
        assert found.label.tolist() == z[f"fedmatch_{kind}_label"].tolist()


def test_the_nearest_clients_help_and_of_equals_the_lower_id() -> None:
    embeddings = torch.tensor([[0.0, 0], [1, 0], [0, 1], [5, 5], [5, 6]])
    found = nearest([2, 3, 7, 8, 9], embeddings, 2)
    assert found == [[3, 7], [2, 7], [2, 3], [9, 3], [8, 3]]
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
    if changes:
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


def test_without_its_weights_fedmatch_trains_sigma_alone() -> None:
    none = dict.fromkeys(("lam_i", "lam_a", "lam_1", "lam_2"), 0.0)
    one = match_job(5)
    update = FedMatchClient(**{**MATCH, **none, "lam_s": 1.0}).fit(one)
    assert not update.arrays["psi"].any()
    plain = SGDClient(weighting="samples").fit(job(5, 0))
    torch.testing.assert_close(update.arrays["delta"], plain.arrays["delta"], rtol=0, atol=1e-12)


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fixmatch", "uda"])
def test_with_tau_above_1_it_is_fedavg_on_labelled_samples_bit_for_bit(name: str) -> None:
    same = (LABELLED, "strategy.weighting=uniform")
    found = run(name, *same, "strategy.tau=1.01")
    plain = problem().run("strategy=fedavg", *same)
    assert hashes(found) == hashes(plain) != hashes(run(name, *same))
    assert sum(found.per_client.query("metric == 'forwards'").value) == 0


@each
def test_labels_of_unlabelled_samples_change_no_bit(name: str, setting: str) -> None:
    """Every label that is withheld is another one: the same weights, and pseudo labels that are right elsewhere."""
    given = classes((20, 30, 25, 40, 22, 31))
    first = classification(clients=given, cohorts=[range(6)] * 4)
    settings = (f"strategy={name}", *NOISE, *loose(name), setting.replace("}", ", per_class: false}"))
    before = first.run(*settings)

    x, y = (torch.cat([c[i] for c in given]) for i in (0, 1))
    sizes = [len(c[1]) for c in given]
    data, split = (
        Dataset(Samples(x, y), classes=tuple("abc")),
        np.split(np.arange(len(y)), np.cumsum(sizes)[:-1]),
    )
    if setting == SERVER:
        known = Labelled("server", count=30, per_class=False).of_server(data, np.arange(len(y)), 0)
    else:
        known = Labelled("client", share=0.4, per_class=False).of_clients(data, Shards.of(split), 0)[0].index
    hidden = np.setdiff1d(np.arange(len(y)), known)
    y[hidden] = (y[hidden] + 1) % 3
    changed = list(zip(x.split(sizes), y.split(sizes), strict=True))
    after = classification(clients=changed, cohorts=[range(6)] * 4).run(*settings)
    assert hashes(before) == hashes(after)
    if name != "server_only":
        assert [r["pseudo/accuracy"] for r in before.rows] != [r["pseudo/accuracy"] for r in after.rows]
        assert [r["pseudo/kept_share"] for r in before.rows] == [r["pseudo/kept_share"] for r in after.rows]


@pytest.mark.parametrize("name", AT_CLIENTS)
def test_clients_without_labelled_unlabelled_or_any_samples(name: str) -> None:
    """Labels of class 0 alone: client 0 has none of it, client 1 nothing else, client 2 is empty."""
    (x, y), (x1, y1) = classes((12, 9))
    clients = [(x, 1 + y % 2), (x1[:1], y1[:1] * 0), (x[:0], y[:0]), (x, y)]
    only = "data.labelled={at: client, share: 0.5, classes: [0]}"
    one = classification(clients=clients, cohorts=[[0, 1, 2, 3], [0], [1], [2]])
    result = one.run(f"strategy={name}", *NOISE, *loose(name), only)
    refused = [[f["client"] for f in row["failures"]] for row in result.rows]
    assert refused == [[2], [], [], [2]]
    assert all(np.isfinite(r["train_loss"]) for r in result.rows[:3])
    first = hashes(result)
    assert len(set(first)) == 3 and first[2] == first[3]


@each
def test_rows_say_what_became_of_pseudo_labels(name: str, setting: str) -> None:
    rows = run(name, setting).rows
    if name == "server_only":
        assert "server/train_loss" in rows[-1] and rows[-1]["bytes_up"] == 0
        return
    last = rows[-1]
    assert 0 < last["pseudo/kept_share"] <= 1
    assert 0 <= last["pseudo/accuracy"] <= 1 and 1 / 3 <= last["pseudo/most_frequent_share"] <= 1
    assert ("pseudo/global_share" in last) == ("pseudo/agree_share" in last) == (name == "fedlabel")
    assert ("server/train_loss" in last) == (setting == SERVER)


def test_accuracy_of_pseudo_labels_is_that_of_the_labels_withheld() -> None:
    """All samples kept by a model that cannot move: its accuracy on the clients' unlabelled samples."""
    settings = (
        "rounds=1",
        "clients_per_round=6",
        "client.lr=1e-30",
        "client.epochs=1",
        "client.batch_size=100",
    )
    found = run("fixmatch", SERVER, "strategy.tau=0", "strategy.warmup_rounds=0", settings=settings)
    each = found.per_client.pivot(index="client", columns="metric", values="value")
    assert found.rows[0]["pseudo/kept_share"] == 1
    assert found.rows[0]["pseudo/accuracy"] == each["pseudo/right"].sum() / each["pseudo/kept"].sum()
    x, y = (torch.cat([c[i] for c in problem().clients]) for i in (0, 1))
    right = (network()(x).argmax(1) == y).sum()
    assert abs(int(each["pseudo/right"].sum()) - int(right)) <= 30  # the server has thirty of them


@pytest.mark.parametrize(("name", "setting"), [m for m in METHODS if m[0] != "server_only"])
def test_where_labels_are_told_it_is_the_ceiling(name: str, setting: str) -> None:
    told = setting.replace("}", ", withhold: false}")
    found = run(name, told)
    assert hashes(found) != hashes(run(name, setting))
    kept = found.rows[-1]["pseudo/kept_share"]
    assert kept == 1 and "pseudo/accuracy" not in found.rows[-1]


def test_the_server_trains_on_also_if_nobody_answers() -> None:
    strategy, found = recorded(
        "semifl", problem(cohorts=[[0, 1], [], [2, 3], []]), *NOISE, SERVER, *loose("semifl")
    )
    assert len(set(hashes(found))) == 4
    v = strategy.series("v")
    assert v[0].any() and (v[0] == v[1]).all() and (v[1] != v[2]).any()
    nobody = run("semifl", SERVER, "strategy.tau=1", cohorts=[[0, 1]] * 4)
    alone = run("server_only", SERVER, cohorts=[[0, 1]] * 4)
    assert hashes(nobody) == hashes(alone)
    assert [f["kind"] for f in nobody.rows[0]["failures"]] == ["refused"] * 2


def test_semifls_server_by_hand() -> None:
    """w = 1, 2; moves of mean 1 and then -2: v = -1, then -0.5 + 2."""
    rule = method("semifl", "strategy.beta_g=0.5", "strategy.server_lr=0.1")
    state = {"w": torch.tensor([1.0, 2.0]), "v": torch.zeros(2), "buffers": torch.zeros(0)}
    for move, v, w in ((1.0, -1.0, 1.1), (-2.0, 1.5, 0.95)):
        asked = [Outcome(c, "ok", weight=1.0) for c in (0, 1)]
        replies = Replies(asked, {("delta", "mean"): torch.tensor([2 * move, 2 * move])})
        state = rule.update(state, replies, None)
        torch.testing.assert_close(state["v"], torch.full((2,), v))
        torch.testing.assert_close(state["w"], torch.tensor([w, w + 1]))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("semifl", "strategy.order=parallel"),
        ("semifl", "strategy.alpha=5"),
        ("semifl", "strategy.beta_g=0"),
        ("semifl", "strategy.warmup_rounds=0"),
        ("semifl", "strategy.server_epochs=1"),
        ("semifl", "strategy.server_batch=3"),
        ("fixmatch", "strategy.mu=1"),
        ("fedmatch", "strategy.psi_start=0.5"),
        ("fedmatch", "strategy.helpers=0"),
        ("fedmatch", "strategy.schedule=code"),
    ],
)
def test_options_change_what_they_should(name: str, changed: str) -> None:
    more = ["strategy.helpers_every=2", "strategy.lam_i=1"] if name == "fedmatch" else []
    every = {"cohorts": [range(6)] * 4}
    usual, other = (run(name, SERVER, *more, *s, **every) for s in ([], [changed]))
    assert hashes(usual)[-1] != hashes(other)[-1]
    if changed.endswith("code"):  # helpers come in round 3 and stay
        assert hashes(usual)[:3] == hashes(other)[:3]


def test_statistics_of_the_servers_samples() -> None:
    of_server = classification("bn", clients=classes((20, 30, 25, 40, 22, 31)))
    settings = ("strategy=semifl", *NOISE, SERVER, *loose("semifl"))
    usual, other = (of_server.run(*settings, *s) for s in ([], ["strategy.sbn=server"]))
    assert not torch.equal(usual.weights["1.running_mean"], other.weights["1.running_mean"])


def test_fedmatch_sends_helpers_and_counts_them() -> None:
    found = run("fedmatch", LABELLED, "strategy.helpers_every=2", cohorts=[range(6)] * 4)
    down = [r["bytes_down"] for r in found.rows]
    size = sum(v.numel() for v in found.weights.values()) * 4
    assert down[0] == down[1] == 6 * 2 * size and down[2] == down[3] == 6 * 4 * size


def test_who_must_have_labels() -> None:
    with pytest.raises(ConfigError, match=r"semifl needs data\.labelled\.at=server"):
        run("semifl", LABELLED)
    with pytest.raises(ConfigError, match=r"fedlabel trains on clients' labelled samples"):
        run("fedlabel", SERVER)
    with pytest.raises(ConfigError, match=r"fixmatch needs samples without labels"):
        run("fixmatch")
