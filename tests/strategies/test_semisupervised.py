"""What methods on unlabelled samples promise of whole runs: whose labels count, what is logged, who is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import classes, classification, hashes, method, network, recorded
from semi import LABELLED, NOISE

from fedsim.data.dataset import Dataset, Samples
from fedsim.data.labelled import Labelled
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Outcome, Replies

SERVER = "data.labelled={at: server, count: 30}"
AT_CLIENTS = ("fedlabel", "fixmatch", "uda", "fedmatch")
AT_SERVER = ("semifl", "fixmatch", "uda", "fedmatch", "server_only")
METHODS = [*((m, LABELLED) for m in AT_CLIENTS), *((m, SERVER) for m in AT_SERVER)]
LOOSE = {"fedlabel": "beta", "fedmatch": "confidence"}  # what decides whether a label is kept
each = pytest.mark.parametrize(("name", "setting"), METHODS, ids=lambda v: str(v).partition("{at: ")[2] or v)


def loose(name: str) -> list[str]:
    """So that untrained models keep some labels."""
    return [] if name == "server_only" else [f"strategy.{LOOSE.get(name, 'tau')}=0.35"]


def problem(**changes: Any) -> Any:
    return classification(clients=classes((20, 30, 25, 40, 22, 31)), **changes)


def run(name: str, *settings: str, **changes: Any) -> Any:
    return problem(**changes).run(f"strategy={name}", *NOISE, *loose(name), *settings)


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
