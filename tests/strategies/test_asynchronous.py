"""FedAsync and FedBuff against a plain event loop that trains every client the moment it starts."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callbacks import Interrupt
from problems import Problem, Quadratic, classes, classification, golden, hashes, linear_loss, network

from fedsim.errors import ConfigError

SPEED, LR, STEPS = (5.0, 2.0, 1.0, 0.7), 0.05, 4


@pytest.fixture
def fleet(tmp_path: Path) -> list[str]:
    """Four devices: 1 kB/s down, 0.5 kB/s up, 100 ms."""
    rows = "\n".join(f"{s},1,0.5,100" for s in SPEED)
    (tmp_path / "fleet.csv").write_text(f"speed,down,up,latency\n{rows}\n")
    return ["system=table", f"system.devices.path={tmp_path / 'fleet.csv'}"]


def problem() -> Problem:
    """The golden quadratic clients, two samples each in one batch; plain gradient descent."""
    z = golden()
    settings = (
        "dtype=float64",
        "rounds=5",
        "client.batch_size=2",
        f"client.epochs={STEPS}",
        "client.shuffle=false",
    )
    settings += (
        "clients_per_round=4",
        f"client.lr={LR}",
        "client.lr_decay=1",
        "client.weight_decay=0",
        "client.clip_norm=null",
    )
    clients = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(z["A"], z["b"], strict=True)]
    return Problem(Quadratic(6), clients, settings, linear_loss, initial={"x": torch.tensor(z["x0"])})


def train(client: int, x: np.ndarray, mu: float) -> np.ndarray:
    z, start = golden(), x
    a, b = z["A"][client], z["b"][client]
    for _ in range(STEPS):
        gradient = (a @ x - b).mean(0)
        x = x - LR * (gradient + mu * (x - start))
    return x


def seconds(client: int) -> float:
    """48 bytes down, the same and a weight of 8 up; two samples a step."""
    return 0.1 + 48 / 1000 + 2 * STEPS / SPEED[client] + 0.1 + 56 / 500


class Eager:
    """All clients start at once; one that answered starts again as soon as there is a version it has not had, or when
    nobody is under way."""

    def __init__(self, mu: float):
        self.x, self.version, self.time, self.mu = golden()["x0"], 0, 0.0, mu
        self.heap: list[Any] = []
        self.had: dict[int, int] = {}
        self.order: list[tuple[int, int]] = []
        self.refill()

    def refill(self) -> None:
        flying = {c for _, c, *_ in self.heap}
        if not flying:
            self.had.clear()
        for c in range(4):
            if c not in flying and self.had.get(c) != self.version:
                self.had[c] = self.version
                item = (self.time + seconds(c), c, self.version, self.x, train(c, self.x, self.mu))
                heapq.heappush(self.heap, item)

    def answer(self) -> tuple[int, np.ndarray, np.ndarray]:
        self.time, client, version, sent, trained = heapq.heappop(self.heap)
        self.order.append((client, self.version - version))
        return self.version - version, sent, trained


def fedbuff(rounds: int, buffer: int, a: float) -> tuple[list[np.ndarray], Eager]:
    world, out, held = Eager(0.0), [], []
    while len(out) < rounds:
        tau, sent, trained = world.answer()
        held.append((1 + tau) ** -a * (trained - sent))
        if len(held) == buffer:
            world.x, world.version, held = world.x + 0.7 * np.mean(held, axis=0), world.version + 1, []
            out.append(world.x)
        world.refill()
    return out, world


def fedasync(answers: int, alpha: float, scale: Any) -> tuple[list[np.ndarray], Eager]:
    world, out = Eager(0.3), []
    for _ in range(answers):
        tau, _, trained = world.answer()
        weight = alpha * scale(tau)
        world.x, world.version = (1 - weight) * world.x + weight * trained, world.version + 1
        out.append(world.x)
        world.refill()
    return out, world


def test_fedbuff_is_its_event_loop(fleet: list[str]) -> None:
    settings = ["strategy=fedbuff", "strategy.buffer=3", "strategy.concurrency=4", "strategy.server_lr=0.7"]
    expected, world = fedbuff(5, 3, 0.5)
    assert max(tau for _, tau in world.order) >= 2
    result = problem().run(*settings, *fleet)
    np.testing.assert_allclose(result.weights["x"], expected[-1], rtol=0, atol=1e-13)
    assert sum(row["sim_seconds"] for row in result.rows) == pytest.approx(world.time)
    heard = [sorted({c for c, _ in world.order[i : i + 3]}) for i in range(0, 15, 3)]
    assert [row["cohort"] for row in result.rows] == heard
    staleness = [np.mean([tau for _, tau in world.order[i : i + 3]]) for i in range(0, 15, 3)]
    assert [row["staleness"] for row in result.rows] == pytest.approx(staleness)
    assert [row["bytes_up"] for row in result.rows] == [3 * 56] * 5


def test_fewer_clients_than_the_buffer_are_asked_again(fleet: list[str]) -> None:
    settings = ["strategy=fedbuff", "strategy.buffer=6", "strategy.concurrency=9", "strategy.server_lr=0.7"]
    expected, world = fedbuff(5, 6, 0.5)
    result = problem().run(*settings, *fleet)
    np.testing.assert_allclose(result.weights["x"], expected[-1], rtol=0, atol=1e-13)
    assert sum(row["sim_seconds"] for row in result.rows) == pytest.approx(world.time)
    assert [row["bytes_up"] for row in result.rows] == [6 * 56] * 5
    assert not any("idle_seconds" in row for row in result.rows)


def test_of_clients_that_drop_out_the_others_fill_the_buffer() -> None:
    """Draws of a client asked again are others: no two of its updates of one version are alike."""
    fast = ("system=lognormal", "system.dropout.after=0.5", "strategy.buffer=8", "rounds=6")
    result = classification("dropout").run("strategy=fedbuff", *fast)
    filled = [row for row in result.rows if "idle_seconds" not in row]
    assert len(filled) >= 4 and all(row["sim_seconds"] < 600 for row in filled)
    assert len(set(hashes(result))) >= len(filled)
    again = classification("dropout").run("strategy=fedbuff", *fast, "engine.chunks=1")
    assert [row["sim_seconds"] for row in again.rows] == [row["sim_seconds"] for row in result.rows]


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        (["strategy.staleness=constant"], lambda tau: 1.0),
        (["strategy.staleness=polynomial", "strategy.a=0.7"], lambda tau: (1 + tau) ** -0.7),
        (
            ["strategy.staleness=hinge", "strategy.a=2", "strategy.b=1"],
            lambda tau: 1 if tau <= 1 else 1 / (2 * (tau - 1) + 1),
        ),
    ],
)
def test_fedasync_is_its_event_loop(fleet: list[str], options: list[str], scale: Any) -> None:
    settings = ["strategy=fedasync", "strategy.answers_per_round=2", "strategy.concurrency=4"]
    settings += ["strategy.alpha=0.4", "strategy.mu=0.3", *options]
    expected, world = fedasync(10, 0.4, scale)
    result = problem().run(*settings, *fleet)
    np.testing.assert_allclose(result.weights["x"], expected[-1], rtol=0, atol=1e-13)
    assert sum(row["sim_seconds"] for row in result.rows) == pytest.approx(world.time)


def test_equal_devices_and_a_full_buffer_are_fedavg_in_the_first_round(tmp_path: Path) -> None:
    (tmp_path / "fleet.csv").write_text("speed,down,up\n" + "1,1,1\n" * 4)
    same = ["system=table", f"system.devices.path={tmp_path / 'fleet.csv'}", "rounds=1"]
    buffered = problem().run("strategy=fedbuff", "strategy.buffer=4", "strategy.concurrency=4", *same)
    averaged = problem().run(
        "strategy=fedavg", "strategy.weighting=uniform", "clients_per_round=4", "rounds=1"
    )
    torch.testing.assert_close(buffered.weights["x"], averaged.weights["x"], rtol=0, atol=1e-15)


def test_one_at_a_time_nobody_is_stale(fleet: list[str]) -> None:
    result = problem().run(
        "strategy=fedasync", "strategy.concurrency=1", "strategy.answers_per_round=1", *fleet
    )
    assert [row["staleness"] for row in result.rows] == [0] * 5
    for row in result.rows:
        assert row["sim_seconds"] == pytest.approx(seconds(row["cohort"][0]))


HARD = [
    "system=lognormal",
    "system/availability=random",
    "system.dropout.during=0.2",
    "system.dropout.before=0.1",
]
HARD += [
    "system.availability.every=0.4",
    "system.deadline=0.6",
    "system.stragglers=partial",
    "system.idle=0.1",
]
KEPT = ("sim_seconds", "cohort", "failures", "weights_hash", "staleness")


@pytest.mark.parametrize(("strategy", "count"), [("fedbuff", "buffer"), ("fedasync", "answers_per_round")])
def test_any_number_of_workers_gives_the_same_times_and_bits(strategy: str, count: str, ray: str) -> None:
    settings = [f"strategy={strategy}", f"strategy.{count}=2", "strategy.concurrency=4", "rounds=8", *HARD]
    runs = [
        classification("bn").run(*settings, *o)
        for o in ([], [ray, "engine.workers=1"], [ray, "engine.workers=3"])
    ]
    first, *others = ([[row.get(k) for k in KEPT] for row in run.rows] for run in runs)
    assert len({row[3] for row in first}) > 3 and any(row[2] for row in first)
    assert all(other == first for other in others)


@pytest.mark.parametrize("strategy", ["fedbuff", "fedasync"])
def test_stopped_with_clients_under_way_and_resumed_it_ends_the_same(strategy: str, tmp_path: Path) -> None:
    settings = [f"strategy={strategy}", "strategy.concurrency=4", "rounds=6", "sampling=oort", *HARD]
    run = classification("bn", settings=("client.epochs=2", "client.batch_size=4")).run
    expected = [[row.get(k) for k in KEPT] for row in run(*settings).rows]
    for after in (1, 4):
        place = f"dir={tmp_path / str(after)}"
        with pytest.raises(KeyboardInterrupt):
            run(*settings, place, callbacks=[Interrupt(after)])
        assert [[row.get(k) for k in KEPT] for row in run(*settings, place).rows] == expected


def test_the_concurrency_is_a_limit(fleet: list[str]) -> None:
    """With two under way and four clients, the two fastest do not take all the turns: others are drawn."""
    result = problem().run("strategy=fedbuff", "strategy.concurrency=2", "strategy.buffer=2", *fleet)
    assert max(row["staleness"] for row in result.rows) <= 2
    assert {c for row in result.rows for c in row["cohort"]} == {0, 1, 2, 3}


def test_nobody_there_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("client,start_s,end_s\n7,1500,3000\n")
    settings = [
        "system=lognormal",
        "system/availability=trace",
        f"system.availability.path={tmp_path / 'trace.csv'}",
    ]
    settings += ["system.idle=1000", "+system.traces=x", "system.availability.period=3600", "rounds=3"]
    result = classification().run(
        "strategy=fedbuff", "strategy.buffer=3", "strategy.concurrency=3", *settings
    )
    assert [row["cohort"] for row in result.rows[:2]] == [[], []] and len(result.rows[2]["cohort"]) == 3
    assert result.rows[0]["sim_seconds"] == result.rows[0]["idle_seconds"] == 1000


def test_an_aggregator_takes_the_place_of_the_mean(fleet: list[str]) -> None:
    class Middle:
        def __call__(self, updates: torch.Tensor, weights: Any = None) -> torch.Tensor:
            return updates.median(dim=0).values

    from problems import method

    strategy = method("fedbuff", "strategy.buffer=3", "strategy.concurrency=4", "strategy.server_lr=1.0")
    strategy.aggregator = Middle()
    result = problem().run("rounds=1", *fleet, strategy=strategy)
    x0 = golden()["x0"]
    deltas = [train(c, x0, 0.0) - x0 for c in (0, 1, 2)]
    np.testing.assert_allclose(result.weights["x"], x0 + np.median(deltas, axis=0), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "needs devices that take different times; add system=lognormal"),
        (
            ["system=lognormal", "system.over_selection=2", "system.stragglers=drop"],
            "system.over_selection: an asynchronous",
        ),
        (["system=lognormal", "strategy.concurrency=0"], "strategy.concurrency=0: must be at least 1"),
        (["system=lognormal", "strategy.staleness=old"], "strategy.staleness=old: choose one of constant"),
    ],
)
def test_impossible_settings_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run("strategy=fedbuff", *overrides)


def test_given_cohorts_are_refused() -> None:
    with pytest.raises(ConfigError, match="cohorts: an asynchronous method starts clients by itself"):
        classification(cohorts=[[0]] * 4).run("strategy=fedbuff", "system=lognormal")


def test_samples_weigh_in_the_buffer(tmp_path: Path) -> None:
    (tmp_path / "fleet.csv").write_text("speed,down,up\n" + "1,1,1\n" * 3)
    same = ["system=table", f"system.devices.path={tmp_path / 'fleet.csv'}", "rounds=1", "dtype=float64"]
    three = Problem(network(), classes((4, 8, 12)), ("clients_per_round=3",))
    buffered = three.run("strategy=fedbuff", "strategy.weighting=samples", "strategy.buffer=3", *same)
    averaged = three.run("strategy=fedavg", "strategy.weighting=samples", "rounds=1", "dtype=float64")
    for name, value in averaged.weights.items():
        torch.testing.assert_close(buffered.weights[name], value, rtol=0, atol=1e-15)
    assert hashes(buffered) != hashes(three.run("strategy=fedbuff", "strategy.buffer=3", *same))
