"""Clustered methods: reference arrays, one cluster is FedAvg, who moves and who stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import GOLDEN, classes, classification, hashes, method, network, recorded
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.task.layout import Layout
from strategies.cfl import Criterion, update_norms
from strategies.clusters import adjusted_rand, bipartition, cosines, far_apart, nearest, separation
from strategies.fesem import fesem_step
from strategies.ifca import ifca_pick, ifca_update

UNIFORM = ("strategy=fedavg", "strategy.weighting=uniform")
SPLITTING = ("strategy.first_round=2", "strategy.min_size=2", "strategy.ratio=100", "strategy.separation=-3")


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "clusters.npz") as z:
        return {k: torch.from_numpy(z[k]) for k in z}


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# -- equations ----------------------------------------------------------------------------------------------------


def test_ifca_gives_the_reference_rounds() -> None:
    z = golden()
    theta = z["theta0"]
    for t, active in enumerate(z["active"]):
        goals = z["targets"][active]
        losses = (theta[None] - goals[:, None]).square().sum(2) / 2
        picks = ifca_pick(losses)
        assert picks.tolist() == z["ifca_pick"][t].tolist()
        theta = ifca_update(theta, picks, float(z["lr"]) * (goals - theta[picks]), z["sizes"][active])
        close(theta, z["ifca_theta"][t])


def test_fesem_gives_the_reference_rounds() -> None:
    z = golden()
    centres = z["fesem_centres0"]
    for t in range(4):
        picks, centres = fesem_step(z["fesem_models"], centres)
        assert picks.tolist() == z["fesem_pick"][t].tolist()
        close(centres, z["fesem_centres"][t])


def test_cfl_gives_the_reference_halves() -> None:
    z = golden()
    first, second = bipartition(cosines(z["cfl_deltas"]))
    assert first == z["cfl_first"].tolist() and second == z["cfl_second"].tolist()
    mean, most = update_norms(z["cfl_deltas"])
    assert mean == pytest.approx(float(z["cfl_mean_norm"]), abs=1e-10)
    assert most == pytest.approx(float(z["cfl_max_norm"]), abs=1e-10)


def test_adjusted_rand_index() -> None:
    z = golden()
    for a, b, expected in zip(z["ari_a"], z["ari_b"], z["ari"], strict=True):
        assert adjusted_rand(a.tolist(), b.tolist()) == pytest.approx(float(expected), abs=1e-10)
    assert adjusted_rand(["x"], [3]) == 1.0


def test_when_a_cluster_is_split() -> None:
    east, north = torch.tensor([1.0, 0.1]), torch.tensor([0.1, 1.0])
    two = torch.stack([east, -east, east, -east, east, -east])
    rule = Criterion("relative", ratio=0.5, separation=0.2, eps1=0.4, eps2=1.6, min_size=6)
    apart, halves = rule.halves(two) or (0.0, ([], []))
    assert apart == pytest.approx(2) and halves == ([0, 2, 4], [1, 3, 5])
    assert rule.halves(two, ([0, 2, 4], [1, 3, 5])) == (apart, halves)
    assert rule.halves(two, ([0, 1, 2], [3, 4, 5])) is None  # halves of before that are none now
    assert rule.halves(two[:5]) is None  # too few
    assert rule.halves(torch.stack([east, north] * 3)) is None  # the mean is long
    assert Criterion("absolute", 0.5, 0.2, 0.4, 1.6, 3).halves(two) is None  # the longest is short
    assert Criterion("absolute", 0.5, 0.2, 0.4, 0.9, 3).halves(two) is not None
    similarity = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, -0.5], [0.0, -0.5, 1.0]])
    assert separation(similarity, [0, 1], [2]) == 0.5 + 0.25


def test_far_apart_and_nearest() -> None:
    models = torch.tensor([[0.0], [1.0], [9.0], [5.0]])
    assert far_apart(models, 3) == [0, 2, 3]
    assert nearest(models, torch.tensor([[0.0], [2.0], [2.0]])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("confirm", "first"), [("true", 2), ("false", 1)])
def test_a_split_waits_for_halves_of_the_round_before(confirm: str, first: int) -> None:
    splitting = (
        *SPLITTING[1:],
        "strategy.first_round=1",
        "strategy.max_clusters=2",
        f"strategy.confirm={confirm}",
    )
    rows = classification().run("strategy=cfl", "clients_per_round=6", *splitting, "rounds=2").rows
    assert next(r["round"] for r in rows if r["clusters"] > 1) == first


# -- one cluster --------------------------------------------------------------------------------------------------

ALL = "clients_per_round=6"
ONE = [
    (("strategy=ifca", "strategy.k=1"), ("strategy=fedavg",)),
    (("strategy=fesem", "strategy.k=1", ALL), (*UNIFORM, ALL)),
    (("strategy=fesem", "strategy.k=1", "strategy.remember=distance", ALL), (*UNIFORM, ALL)),
    (("strategy=cfl", ALL), (*UNIFORM, ALL)),
    (("strategy=cfl", "strategy.stale=3"), UNIFORM),
    (
        ("strategy=ifca", "strategy.k=1", "strategy@strategy.base=fedsam"),
        ("strategy=fedsam", "strategy.weighting=uniform"),
    ),
]


@pytest.mark.parametrize("ray_too", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("clustered", "plain"), ONE, ids=lambda v: " ".join(v))
def test_one_cluster_is_fedavg_bit_for_bit(
    clustered: Any, plain: Any, ray_too: bool, request: pytest.FixtureRequest
) -> None:
    problem = classification("bn")
    engine = (request.getfixturevalue("ray"), "engine.workers=2") if ray_too else ()
    found = problem.run(*clustered, *engine)
    assert hashes(found) == hashes(problem.run(*plain))
    assert found.rows[-1]["clusters"] == 1


# -- several ------------------------------------------------------------------------------------------------------


def flat(recording: Any, t: int, name: str) -> Tensor:
    return recording.states[t][name]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["ifca", "fesem", "cfl"])
def test_who_takes_no_part_stays_where_it_is(name: str) -> None:
    """A cluster that nobody trains for keeps its bits, an absent client its cluster."""
    alone = ("strategy.remember=distance",) if name == "fesem" else ()
    extra = ("strategy.stale=9", *SPLITTING) if name == "cfl" else ("strategy.k=3", *alone)
    problem = classification(cohorts=[range(6), range(6), [0, 1], [0], [4]])
    recording, result = recorded(name, problem, *extra, "rounds=5")
    for t in (2, 3, 4):
        before, after = (flat(recording, i, "assignment") for i in (t - 1, t))
        absent = [c for c in range(6) if c not in result.rows[t]["cohort"]]
        present = [c for c in range(6) if c in result.rows[t]["cohort"]]
        if name != "cfl":
            assert torch.equal(before[absent], after[absent])
        trained = {int(a[c]) for a in (before, after) for c in present}
        k = len(flat(recording, t - 1, "centres"))
        idle = [j for j in range(k) if j not in trained]
        assert idle or name == "cfl"
        assert torch.equal(flat(recording, t - 1, "centres")[idle], flat(recording, t, "centres")[idle])
    assert sum(result.rows[-1]["cluster_sizes"]) == 6 and result.rows[-1]["clusters"] > 1


def test_ifca_chooses_by_the_least_loss_over_training_samples() -> None:
    problem = classification(cohorts=[range(6)] * 2)
    recording, result = recorded("ifca", problem, "strategy.k=2", "rounds=2", "dtype=float64")
    centres, losses = flat(recording, 0, "centres"), []
    layout = Layout(network())
    for w in centres:
        model = network().double()
        model.load_state_dict(layout.named(layout.expand(w)))
        losses.append(
            [torch.nn.functional.cross_entropy(model(x.double()), y).item() for x, y in problem.clients]
        )
    expected = ifca_pick(torch.tensor(losses, dtype=torch.float64).T)
    assert flat(recording, 1, "assignment").tolist() == expected.tolist()
    d = sum(v.numel() for v in result.weights.values())
    assert result.rows[1]["bytes_down"] == 6 * 2 * 8 * d  # all centres go down, one model up
    assert result.rows[0]["start"]["bytes_up"] == 6 * (8 * d + 8)
    assert len(result.per_client.query("metric == 'spread/weight'")) == 6


def test_ifca_with_gradients_and_from_restarts() -> None:
    problem = classification(model=lambda: torch.nn.Linear(4, 3), cohorts=[range(6)] * 2)
    settings = ("strategy=ifca", "strategy.k=2", "rounds=2", "strategy.start=random")
    runs = [problem.run(*settings, f"strategy.restarts={n}", "strategy.update=gradient") for n in (1, 3)]
    assert len({*map(tuple, map(hashes, runs))}) == 2
    assert "start" not in runs[0].rows[0] and runs[1].rows[0]["start"]["bytes_up"] > 0
    one = problem.run(
        *UNIFORM, "client.epochs=1", "client.batch_size=100", "client.weight_decay=0", "rounds=1"
    )
    same = problem.run(
        "strategy=ifca",
        "strategy.k=1",
        "strategy.update=gradient",
        "strategy.base.weighting=uniform",
        "rounds=1",
    )
    for name, value in one.weights.items():
        torch.testing.assert_close(same.weights[name], value, rtol=0, atol=1e-6)


def test_test_labels_choose_nothing() -> None:
    """Clients' own tests come from the common test set, whose labels are permuted."""
    settings = ("strategy=ifca", "strategy.k=3", "evaluation.local_test=true", "evaluation.clients_every=1")
    x, y = classes((60,), seed=1)[0]
    found, permuted = (classification(test=(x, labels)).run(*settings) for labels in (y, (y + 1) % 3))
    assert hashes(found) == hashes(permuted)
    assert found.rows[-1]["cluster_sizes"] == permuted.rows[-1]["cluster_sizes"]
    assert found.rows[-1]["clients/accuracy"] != permuted.rows[-1]["clients/accuracy"]


@pytest.mark.parametrize("name", ["ifca", "fesem", "cfl"])
def test_clients_are_measured_and_handed_out_under_their_own_cluster(name: str, tmp_path: Any) -> None:
    extra = (ALL, *SPLITTING) if name == "cfl" else ("strategy.k=2",)
    problem = classification(clients=classes((20, 24, 16, 12, 20, 28)))
    settings = (f"strategy={name}", *extra, "evaluation.holdout=0.3", "evaluation.clients_every=4")
    found = problem.run(*settings, f"dir={tmp_path / 'run'}", "evaluation.held_out_clients=0.2")
    row, table = found.rows[-1], found.per_client
    each = table.query("metric == 'evaluate/accuracy' and round == 4").set_index("client").value
    assert row["clients/accuracy"] == pytest.approx(each.mean()) and len(each) == 5
    assert "participation_gap" in row and 0 <= row["held_out/accuracy"] <= 1
    assert not any(r["failures"] for r in found.rows)
    there = sorted(each.index)
    models = {c: torch.cat([p.flatten() for p in found.model(client=c).parameters()]) for c in there}
    assert 1 < len({tuple(m.tolist()) for m in models.values()}) <= row["clusters"]


def test_held_out_clients_take_part_in_nothing() -> None:
    problem = classification(clients=classes((20, 24, 16, 12, 20, 28)))
    for name, extra in (("ifca", "strategy.k=2"), ("fesem", "strategy.k=2"), ("cfl", "strategy.stale=5")):
        found = problem.run(
            f"strategy={name}", extra, "evaluation.held_out_clients=0.3", "evaluation.every=4"
        )
        table = found.per_client
        asked = {*table[~table.metric.str.startswith("held_out")].client}
        held = {*table[table.metric.str.startswith("held_out")].client}
        assert len(held) == 2 and not asked & held


@pytest.mark.parametrize("name", ["ifca", "fesem", "cfl"])
def test_a_killed_run_goes_on(name: str, tmp_path: Any) -> None:
    extra = (ALL, *SPLITTING) if name == "cfl" else ("strategy.k=2",)
    settings = (f"strategy={name}", *extra, f"dir={tmp_path / name}", "checkpoint.every=1")
    problem = classification("bn")
    whole = hashes(problem.run(f"strategy={name}", *extra))
    problem.run(*settings, "rounds=2")
    assert hashes(problem.run(*settings, "rounds=4"))[-2:] == whole[-2:]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("strategy=cfl",), "strategy=cfl needs clients_per_round=num_clients"),
        (("strategy=ifca", "strategy.k=7"), "more clusters than the 6 clients"),
        (("strategy=ifca", "strategy.start=nearby"), "choose one of spread, random"),
        (("strategy=ifca", "strategy.update=both"), "choose one of model, gradient"),
        (("strategy=ifca", "strategy@strategy.base=scaffold"), "its server does more than average"),
        (("strategy=fesem", "strategy.base.server_lr=0.5"), "centres are means of models"),
        (("strategy=fesem", "strategy.base.weighting=samples"), "members of a cluster weigh the same"),
        (("strategy=fesem", "strategy.spread_clients=2"), "fewer than the 4 clusters"),
    ],
)
def test_what_cannot_be_is_refused(settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classification().run(*settings)


def test_options_are_what_the_pages_say() -> None:
    assert method("ifca").k == 4 and method("cfl").rule.min_size == 6 and method("cfl").from_round == 10
    assert method("cfl", "strategy.criterion=absolute").rule.min_size == 3
