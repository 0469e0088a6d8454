"""Attacks: drawn by the seed, and each against what it says."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    GOLDEN,
    Problem,
    Quadratic,
    classes,
    classification,
    hashes,
    linear_loss,
    method,
    network,
)
from torch import nn

from clients.attacks import ALIE, IPM, Attacked, Mimic, SignFlip, alie_z
from clients.sgd import SGDClient
from fedsim.config.check import validate
from fedsim.config.compose import compose
from fedsim.errors import ConfigError
from fedsim.exchange.fold import Folder, combine
from fedsim.exchange.payload import Outcome
from fedsim.server.collusion import Collusion, draw_attackers
from fedsim.task.layout import Layout
from strategies.aggregators import mean


class Spy:
    """An aggregator that notes what it was given and returns its mean."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, updates: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(Layout(network(), updates.dtype).compact(updates).clone())
        return mean(updates, weights)


def sent(
    attack: str, *options: str, clients: Any = None, rounds: int = 1
) -> tuple[list[torch.Tensor], list[int]]:
    """Updates (n, d) of each round under an attack by 2 of 6 clients, all taking part, and the attackers."""
    problem = classification(cohorts=[range(6)] * rounds, **({"clients": clients} if clients else {}))
    strategy, spy = method("fedavg"), Spy()
    strategy.aggregator = spy
    settings = [f"rounds={rounds}", "dtype=float64", f"attack={attack}", *options]
    settings += [] if attack == "none" else ["attack.fraction=0.34"]
    result = problem.run(*settings, strategy=strategy)
    who = json.loads((result.dir / "attackers.json").read_text()) if attack != "none" else []
    return spy.seen, who


@pytest.fixture(scope="module")
def honest() -> torch.Tensor:
    """What all six clients send when none attacks (6, d)."""
    return sent("none")[0][0]


def split(updates: torch.Tensor, attackers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    others = [i for i in range(6) if i not in attackers]
    return updates[attackers], updates[others]


# -- who attacks --------------------------------------------------------------------------------------------------


def test_attackers_are_drawn_by_the_seed_alone_and_recorded() -> None:
    assert draw_attackers(0, 15, 0.2) == draw_attackers(0, 15, 0.2) != draw_attackers(1, 15, 0.2)
    for m, fraction, count in (
        (15, 0.2, 3),
        (30, 0.2, 6),
        (60, 0.2, 12),
        (7, 0.0, 0),
        (4, 1.0, 4),
        (6, 0.34, 2),
    ):
        drawn = draw_attackers(3, m, fraction)
        assert len(set(drawn)) == count and drawn == sorted(drawn) and all(0 <= c < m for c in drawn)
    for attack in ("sign_flip", "alie"):
        _, who = sent(attack)
        assert who == draw_attackers(0, 6, 0.34)


def test_without_attackers_nothing_changes() -> None:
    plain = classification().run()
    assert not (plain.dir / "attackers.json").exists()
    for attack in ("reverse", "alie"):
        nobody = classification().run(f"attack={attack}", "attack.fraction=0")
        assert hashes(nobody) == hashes(plain)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attack.fraction=1.2", r"attack.fraction=1.2: must be in \[0, 1\]"),
        ("attack.fraction=many", r"attack.fraction=many: must be a number"),
    ],
)
def test_an_impossible_fraction_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(compose(["attack=alie", override]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("attack=drop", "attack.loss=2"), r"attack.loss=2: a probability"),
        (
            ("attack=random_uniform", "attack.distribution=cauchy"),
            r"attack.distribution=cauchy: choose one of",
        ),
        (("attack=nonfinite", "attack.value=0"), r"attack.value=0: choose one of nan, inf, -inf"),
        (("attack=mimic", "attack.victim=last"), r"attack.victim=last: choose one of first, extreme"),
        (("attack=sign_flip", "+attack.scal=3"), r"unknown key 'attack.scal'; nearest is 'attack.scale'"),
    ],
)
def test_impossible_options_are_refused_by_key(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run(*overrides)


# -- what attackers send ------------------------------------------------------------------------------------------


def test_sign_flip_reverses_the_own_update(honest: torch.Tensor) -> None:
    for attack, scale in (("sign_flip", 1), ("reverse", 10)):
        (updates,), who = sent(attack)
        bad, good = split(updates, who)
        assert torch.equal(bad, -scale * honest[who])
        assert torch.equal(good, split(honest, who)[1])


def test_random_updates_are_fresh_for_every_client_and_round() -> None:
    rounds, who = sent("random_uniform", "attack.scale=2", rounds=2)
    bad = torch.cat([split(u, who)[0] for u in rounds])
    assert float(bad.min()) >= 0 and 1.5 < float(bad.max()) < 2
    assert abs(float(bad.mean()) - 1) < 0.1
    assert len({tuple(r.tolist()) for r in bad}) == 4
    (again, _), _ = sent("random_uniform", "attack.scale=2", rounds=2)
    assert torch.equal(again, rounds[0])
    (normal,), who = sent("random_gaussian", "attack.scale=3")
    bad, _ = split(normal, who)
    assert abs(float(bad.mean())) < 1 and abs(float(bad.std()) - 3) < 0.7


def test_alie_and_ipm_are_exact(honest: torch.Tensor) -> None:
    (updates,), who = sent("alie")
    bad, good = split(updates, who)
    assert torch.equal(good, split(honest, who)[1])
    z = alie_z(6, 2)  # s = 4 - 2 = 2: Phi(z) = 2 / 4
    assert z == 0
    np.testing.assert_allclose(bad, good.mean(0).expand(2, -1), atol=1e-15)
    (updates,), _ = sent("alie", "attack.z=1.5")
    expected = good.numpy().mean(0) - 1.5 * good.numpy().std(0, ddof=1)
    np.testing.assert_allclose(updates[who], np.tile(expected, (2, 1)), rtol=0, atol=1e-14)
    (updates,), _ = sent("ipm", "attack.epsilon=0.5")
    np.testing.assert_allclose(updates[who], (-0.5 * good.mean(0)).expand(2, -1), rtol=0, atol=1e-15)


def test_alie_and_ipm_reproduce_their_golden_arrays() -> None:
    with np.load(GOLDEN / "flag/robust_n7.npz") as z:
        updates, f = torch.tensor(z["updates"]), int(z["f"])
        own, good = updates[:f], updates[f:]
        assert alie_z(7, f) == pytest.approx(float(z["alie_z"]), abs=1e-12)
        sent_alie = ALIE(fraction=0.2, z=None).collude(own, good)
        np.testing.assert_allclose(sent_alie[0], z["attack_alie"], rtol=0, atol=1e-10)
        sent_ipm = IPM(fraction=0.2, epsilon=0.1).collude(own, good)
        np.testing.assert_allclose(sent_ipm[0], z["attack_ipm"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("n", "f", "z"), [(15, 3, 0.2104), (20, 5, 0.2533), (50, 12, 0.336)])
def test_alie_z_of_the_paper(n: int, f: int, z: float) -> None:
    assert alie_z(n, f) == pytest.approx(z, abs=1e-4)


def test_alie_of_one_honest_update_is_finite() -> None:
    sole = torch.tensor([[1.0, -2.0]])
    assert torch.equal(ALIE(fraction=0.5, z=1.0).collude(torch.zeros(2, 2), sole), sole.expand(2, 2))
    assert np.isfinite(alie_z(2, 1)) and np.isfinite(alie_z(5, 4))


def test_mimic_copies_one_honest_client(honest: torch.Tensor) -> None:
    (updates,), who = sent("mimic")
    first = next(i for i in range(6) if i not in who)
    assert torch.equal(updates[who], honest[first].expand(2, -1))
    rows = torch.tensor([[0.0, 0.0], [0.1, 1.0], [5.0, 0.0], [-1.0, 0.0]])
    copies = Mimic(fraction=0.5, victim="extreme").collude(rows[:2], rows)
    assert torch.equal(copies, rows[2].expand(2, -1))


def test_flipped_labels_are_honest_training_on_other_labels() -> None:
    _, who = sent("label_flip")
    poisoned = [(x, 2 - y) if i in who else (x, y) for i, (x, y) in enumerate(classes())]
    (updates,), _ = sent("label_flip")
    (expected,), _ = sent("none", clients=poisoned)
    assert torch.equal(updates, expected)


def test_flipping_what_is_no_label_is_refused() -> None:
    pair = (torch.eye(2).view(1, 2, 2), torch.ones(1, 2))
    problem = Problem(
        Quadratic(2), [pair] * 2, ("rounds=1", "clients_per_round=2", "dtype=float64"), loss=linear_loss
    )
    with pytest.raises(ConfigError, match="flipping labels needs class labels"):
        problem.run("attack=label_flip", "attack.fraction=1")
    problem = Problem(nn.Linear(4, 3), classes(), ("rounds=1", "clients_per_round=2"))
    with pytest.raises(ConfigError, match="attack: CatMap: expected square images"):
        problem.run("attack=cat_map", "attack.fraction=1")


def test_lossy_links_lose_entries_packets_or_updates(honest: torch.Tensor) -> None:
    (updates,), who = sent("drop", "attack.loss=0.3")
    bad, good = split(updates, who)
    lost = bad == 0
    assert torch.equal(bad[~lost], honest[who][~lost]) and 0.15 < float(lost.double().mean()) < 0.45
    assert torch.equal(good, split(honest, who)[1])
    (updates,), _ = sent("drop", "attack.loss=0.5", "attack.packet=5")
    gone = updates[who] == 0
    whole = gone[:, : gone.shape[1] // 5 * 5].view(2, -1, 5)
    assert torch.equal(whole.all(-1), whole.any(-1)) and 0 < float(whole.double().mean()) < 1
    result = classification(cohorts=[range(6)]).run(
        "rounds=1", "attack=drop", "attack.loss=1", "attack.packet=null", "attack.fraction=0.34"
    )
    told = [(f["client"], f["kind"], "lost on the way" in f["reason"]) for f in result.rows[0]["failures"]]
    assert told == [(c, "refused", True) for c in who]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nonfinite_attackers_are_named_and_left_out(value: str) -> None:
    problem = classification(cohorts=[range(6)] * 2)
    result = problem.run("rounds=2", "attack=nonfinite", f"attack.value={value}", "attack.fraction=0.34")
    who = json.loads((result.dir / "attackers.json").read_text())
    named = [[f["client"] for f in r["failures"] if f["kind"] == "nonfinite"] for r in result.rows]
    assert named == [who, who]
    rest = [i for i in range(6) if i not in who]
    expected = classification(cohorts=[rest] * 2).run("rounds=2", "engine.chunks=1", "dtype=float64").weights
    again = problem.run(
        "rounds=2", "attack=nonfinite", "attack.fraction=0.34", "engine.chunks=1", "dtype=float64"
    )
    for name, weights in expected.items():
        torch.testing.assert_close(again.weights[name], weights, rtol=0, atol=1e-14)


def test_an_omniscient_attack_under_the_mean_is_the_mean_of_the_attacked_stack() -> None:
    """SCAFFOLD sends two arrays, the mean of one and the sum of the other: both are attacked as one vector."""
    torch.manual_seed(0)
    rows = {n: torch.randn(4, 3, dtype=torch.float64) for n in ("c", "delta")}
    kinds = {"delta": ("mean",), "c": ("sum", "stack"), "buffers": ("mean",)}
    ok = [Outcome(i, "ok", weight=float(i + 1)) for i in range(4)]
    collusion = Collusion(frozenset({1, 9}), IPM(fraction=0.2, epsilon=2.0))
    asked = Folder(collusion.widen(kinds))
    for i in range(4):
        asked.add({n: r[i] for n, r in rows.items()} | {"buffers": torch.ones(2)}, ok[i].weight)
    out = collusion.apply(
        combine([asked]), [*ok[:2], Outcome(7, "failed"), *ok[2:]], kinds, Layout(nn.Linear(2, 1))
    )
    for name in rows:
        rows[name][1] = -2 * rows[name][[0, 2, 3]].mean(0)
    weights = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    torch.testing.assert_close(out["delta", "mean"], weights @ rows["delta"])
    torch.testing.assert_close(out["c", "sum"], rows["c"].sum(0))
    assert torch.equal(out["c", "stack"], rows["c"])
    assert torch.equal(out["buffers", "mean"], torch.full((2,), 10.0))
    assert set(out) == {("delta", "mean"), ("c", "sum"), ("c", "stack"), ("buffers", "mean")}


def test_an_attacked_client_travels_and_passes_on_what_is_not_an_exchange() -> None:
    attacked = Attacked(SGDClient(weighting="uniform"), SignFlip(fraction=0.2, scale=1.0), frozenset({1}))
    copy = pickle.loads(pickle.dumps(attacked))
    assert copy == attacked and copy.weighting == "uniform"
    assert not hasattr(copy, "no_such_task")
    layout = None
    assert copy.init_state(layout) == {}


def test_statistics_of_batchnorm_are_not_attacked() -> None:
    settings = ("rounds=1", "clients_per_round=6", "dtype=float64")
    calm = classification("bn").run(*settings)
    for attack in ("reverse", "ipm"):
        stormy = classification("bn").run(*settings, f"attack={attack}", "attack.fraction=0.34")
        for name in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(stormy.weights[name], calm.weights[name])
        assert not torch.equal(stormy.weights["0.weight"], calm.weights["0.weight"])
