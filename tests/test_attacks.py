"""Attacks: each against what it says, worn by any client, drawn by the seed; FedSGD; the warped images."""

from __future__ import annotations

import json
import pickle
from functools import cache
from pathlib import Path
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
    compose_quickly,
    hashes,
    linear_loss,
    method,
    network,
)

from clients.attacks import ALIE, IPM, Attacked, Mimic, SignFlip, alie_z
from clients.sgd import SGDClient
from fedsim.attack import Collusion, draw_attackers
from fedsim.data.warps import CatMap, LotkaVolterra
from fedsim.errors import ClientError, ConfigError, DataError
from fedsim.fold import Folder, combine
from fedsim.payload import Outcome
from fedsim.settings import compose
from fedsim.validation import validate
from strategies.aggregators import mean

CONF = Path(__file__).resolve().parents[1] / "conf/attack"
NAMES = sorted(p.stem for p in CONF.glob("*.yaml"))
IMAGES = ("cat_map", "lotka_volterra")  # attacks that need images


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.api.compose", compose_quickly)


class Spy:
    """An aggregator that notes what it was given and returns its mean."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, updates: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(updates.clone())
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
    with pytest.raises(ClientError, match="flipping labels needs class labels"):
        problem.run("attack=label_flip", "attack.fraction=1")


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


# -- any client, any strategy -------------------------------------------------------------------------------------


@cache
def calm_hashes(settings: tuple[str, ...]) -> list[str]:
    return hashes(classification().run(*settings))


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn", "moon"])
@pytest.mark.parametrize("attack", [n for n in NAMES if n not in (*IMAGES, "none")])
def test_any_client_wears_any_attack(attack: str, strategy: str) -> None:
    settings = (f"strategy={strategy}", "rounds=2", "clients_per_round=6")
    options = ("attack.z=1.0",) if attack == "alie" else ("attack.loss=0.5",) if attack == "drop" else ()
    stormy = classification().run(*settings, f"attack={attack}", "attack.fraction=0.34", *options)
    assert not set(calm_hashes(settings)) & set(hashes(stormy))
    assert all(torch.isfinite(v).all() for v in stormy.weights.values())


@pytest.mark.parametrize(
    ("attack", "method"),
    [
        ("random_uniform", ("strategy=scaffold", "aggregator=flag")),
        ("ipm", ("strategy=scaffold", "aggregator=flag")),
        ("ipm", ("strategy=fedspeed", "strategy.dual_mean=active", "aggregator=norm_clip")),
    ],
)
def test_attacked_runs_have_the_same_bits_on_ray(attack: str, method: tuple[str, ...], ray: str) -> None:
    settings = (*method, f"attack={attack}", "attack.fraction=0.34")
    expected = hashes(classification().run(*settings))
    assert hashes(classification().run(*settings, ray, "engine.workers=2")) == expected


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
    out = collusion.apply(combine([asked]), [*ok[:2], Outcome(7, "failed"), *ok[2:]], kinds)
    for name in rows:
        rows[name][1] = -2 * rows[name][[0, 2, 3]].mean(0)
    weights = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    torch.testing.assert_close(out["delta", "mean"], weights @ rows["delta"])
    torch.testing.assert_close(out["c", "sum"], rows["c"].sum(0))
    assert torch.equal(out["c", "stack"], rows["c"])
    assert torch.equal(out["buffers", "mean"], torch.full((2,), 10.0))
    assert set(out) == {("delta", "mean"), ("c", "sum"), ("c", "stack"), ("buffers", "mean")}


def test_an_attacked_client_travels_and_passes_on_what_is_not_an_exchange() -> None:
    worn = Attacked(SGDClient(weighting="uniform"), SignFlip(fraction=0.2, scale=1.0), frozenset({1}))
    copy = pickle.loads(pickle.dumps(worn))
    assert copy == worn and copy.weighting == "uniform"
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


# -- augmented workers --------------------------------------------------------------------------------------------


def test_the_cat_map_moves_every_pixel_once() -> None:
    x = torch.arange(2 * 25.0).view(2, 1, 5, 5)
    out = CatMap()(x, torch.Generator().manual_seed(0))
    for i in range(5):
        for j in range(5):
            assert out[1, 0, (2 * i + j) % 5, (i + j) % 5] == x[1, 0, i, j]
    period = 10  # of the map on a 5 x 5 torus
    assert torch.equal(CatMap(iterations=period)(x, torch.Generator()), x)
    assert torch.equal(CatMap(p=0.0)(x, torch.Generator()), x)
    with pytest.raises(DataError, match=r"square images"):
        CatMap()(torch.zeros(1, 1, 4, 5), torch.Generator())


def test_the_predator_prey_flow_follows_its_equation() -> None:
    from scipy.integrate import solve_ivp

    side, time = 28, 0.01
    x = torch.arange(1.0, side * side + 1).view(1, 1, side, side)
    out = LotkaVolterra(times=[time])(x, torch.Generator())[0, 0]

    def flow(t: float, z: np.ndarray) -> list[float]:
        return [2 / 3 * z[0] - 4 / 3 * z[0] * z[1], z[0] * z[1] - z[1]]

    moved = 0
    for i, j in ((0, 0), (3, 5), (14, 14), (20, 9), (27, 1), (9, 26), (2, 25)):
        end = solve_ivp(flow, (0, time), [side / 2 - i, side / 2 - j], rtol=1e-10, atol=1e-10).y[:, -1]
        row, column = int(np.floor(side / 2 - end[0])), int(np.floor(side / 2 - end[1]))
        inside = 0 <= row < side and 0 <= column < side
        assert out[i, j] == (x[0, 0, row, column] if inside else 0)
        moved += (row, column) != (i, j)
    assert moved >= 3
    assert torch.equal(LotkaVolterra(times=[0.0])(x, torch.Generator()), x)


@pytest.mark.parametrize("attack", IMAGES)
def test_workers_with_augmented_data_train_on_other_images(attack: str) -> None:
    settings = (
        "engine=serial",
        "tracker=quiet",
        "rounds=1",
        "num_clients=4",
        "clients_per_round=4",
        "client.steps=1",
    )
    import fedsim

    calm = fedsim.simulate([*settings])
    warped = fedsim.simulate([*settings, f"attack={attack}", "attack.fraction=0.25"])
    assert hashes(calm) != hashes(warped)
    both = fedsim.simulate([*settings, f"attack={attack}", "attack.fraction=0.25", "data.augment=true"])
    assert hashes(both) not in (hashes(calm), hashes(warped))


# -- one gradient a round -----------------------------------------------------------------------------------------


def test_fedsgd_is_torchs_sgd_on_the_mean_gradient() -> None:
    clients = classes((8, 8, 8))
    settings = ("strategy=fedsgd", "client.steps=1", "client.batch_size=8", "client.weight_decay=0")
    options = ("strategy.weight_decay=0.01", "strategy.lr_decay=0.5", "strategy.decay_every=2")
    problem = Problem(
        network(), clients, ("rounds=5", "clients_per_round=3", "dtype=float64", "client.lr=0.3")
    )
    run = problem.run(*settings, *options, "client.clip_norm=null")
    model = network().double()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 2, 0.5)
    for _ in range(5):
        optimiser.zero_grad()
        sum(torch.nn.functional.cross_entropy(model(x.double()), y) / 3 for x, y in clients).backward()
        optimiser.step()
        schedule.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.weights[name], value, rtol=0, atol=1e-12)


def test_fedsgd_asks_for_one_step() -> None:
    with pytest.raises(ConfigError, match=r"one gradient a round; add client.steps=1"):
        classification().run("strategy=fedsgd")


@pytest.mark.parametrize("name", ["byzantine", "byzantine_paper"])
def test_the_experiments_compose(name: str) -> None:
    validate(compose([f"experiment={name}"]))


def test_the_grid_composes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    from experiments import byzantine

    args = Namespace(out=str(tmp_path), what="digits", seeds=[0])
    values = byzantine.cohort(args, 15, 2)
    for rule, attack in (("Bulyan", "ALIE z=1.5"), ("flag, unit", "none")):
        for kind in ("gradients", "local"):
            settings = (*byzantine.train(kind, rule), *byzantine.RULES[rule], *byzantine.ATTACKS[attack])
            validate(compose([o.format(**values) for o in (*byzantine.COMMON, *settings)]))
    byzantine.report(args, {("mean", "none"): [90.0, 80.0], ("flag", "none"): [70.0, 71.0]}, "title")
    assert "| mean | 85.0 |\n| flag | 70.5 |" in capsys.readouterr().out
    rows = (tmp_path / "digits/table.csv").read_text().splitlines()
    assert rows[1:] == ["mean,none,85.0,80.0,90.0,2", "flag,none,70.5,70.0,71.0,2"]
    assert (tmp_path / "digits/heatmap.png").stat().st_size > 5000
