"""Asynchronous gossip: against events taken one by one, against the synchronous rounds, resumed, and on workers."""

from __future__ import annotations

import heapq
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callbacks import Photographer
from problems import Problem, classification, hashes
from test_gossip import RING, linear_peers, peers_of
from torch import nn

from fedsim import topology
from fedsim.errors import ConfigError
from fedsim.topology.agenda import Planner, Rules
from fedsim.topology.timing import Constant, Link, LognormalTicks, Profile, UniformInts
from strategies.gossip import variance_corrected_average

TIMING = "fedsim.topology.timing"
PEERS = ("topology=ring", "clients_per_round=6")
INTERVALS = [2.0, 3.0, 2.5, 4.0, 3.5, 5.0]


def one_by_one(
    problem: Problem, a: np.ndarray, b: np.ndarray, until: float, delay: float, trigger: str, inbox: str
) -> np.ndarray:
    """The same peers with every event computed when it comes: lr 0.1, momentum 0.9, own weight 1/2, a ring of six."""
    assert isinstance(problem.model, nn.Module)
    start = problem.model.x.detach().numpy()
    x, m = [start.copy() for _ in range(6)], [np.zeros_like(start) for _ in range(6)]
    boxes: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(6)]
    heap: list[Any] = []
    count = 0

    def push(time: float, kind: str, peer: int, *data: Any) -> None:
        nonlocal count
        heapq.heappush(heap, (time, count, kind, peer, data))
        count += 1

    def mix(i: int) -> None:
        if boxes[i]:
            received = [{"x": torch.tensor(v)} for v, _ in boxes[i]]
            x[i] = variance_corrected_average({"x": torch.tensor(x[i])}, received, scope="all")["x"].numpy()
            boxes[i].clear()

    for i in range(6):
        push(INTERVALS[i], "wake", i)
    while heap and heap[0][0] <= until:
        now, touched = heap[0][0], set()
        while heap and heap[0][0] == now:
            _, _, kind, i, data = heapq.heappop(heap)
            if kind == "wake":
                push(now + INTERVALS[i], "wake", i)
                if trigger == "wakeup":
                    mix(i)
                m[i] = 0.9 * m[i] + a[i] @ x[i] - b[i]
                x[i] = x[i] - 0.1 * m[i]
                for j in sorted(RING[i]):
                    push(now + delay, "message", j, x[i].copy(), i)
            else:
                if inbox == "latest":
                    boxes[i] = [(v, s) for v, s in boxes[i] if s != data[1]]
                boxes[i].append(data)
                touched.add(i)
                if trigger == "receipt":
                    mix(i)
        if trigger == "count":
            for i in sorted(touched):
                if len(boxes[i]) >= 2:
                    mix(i)
    return np.stack(x)


@pytest.mark.parametrize("trigger", ["count", "wakeup", "receipt"])
@pytest.mark.parametrize(
    ("delay", "inbox"), [(0, "latest"), (1.5, "latest"), (0, "accumulate"), (4, "accumulate")]
)
def test_stages_give_what_events_one_by_one_give(
    trigger: str, delay: float, inbox: str, tmp_path: Path
) -> None:
    problem, a, b = linear_peers(rounds=2)
    profile = tmp_path / "ticks.txt"
    profile.write_text("\n".join(map(str, INTERVALS)))
    result = problem.run(
        "strategy=gossip_async",
        "topology=ring",
        "client.momentum=0.9",
        "strategy.ticks_per_round=12",
        f"strategy.trigger={trigger}",
        f"strategy.inbox={inbox}",
        f"strategy.interval={{_target_:{TIMING}.Profile,path:{profile}}}",
        f"strategy.delay={delay}",
    )
    expected = one_by_one(problem, a, b, 24, delay, trigger, inbox)
    np.testing.assert_allclose(peers_of(result)["peers"].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_equal_steps_without_delay_are_the_synchronous_rounds() -> None:
    """Each tick all train, all messages arrive, all inboxes are full: the same bits, momentum and statistics too."""
    problem = classification("bn")
    settings = (
        *PEERS,
        "client.steps=1",
        "client.momentum=0.9",
        "dtype=float64",
        "rounds=4",
        "client.lr_decay=0.9",
    )
    settings = (*settings, "topology=random_regular", "topology.degree=3", "strategy.bn_stats=average")
    rounds = problem.run("strategy=gossip", *settings)
    ticks = problem.run(
        "strategy=gossip_async", *settings, "strategy.ticks_per_round=1", "strategy.interval=1"
    )
    assert hashes(ticks) == hashes(rounds)
    assert [r["bytes_up"] for r in ticks.rows] == [r["bytes_up"] for r in rounds.rows]
    assert [r["train_loss"] for r in ticks.rows] == [r["train_loss"] for r in rounds.rows]


ROUGH = (
    *PEERS,
    "client.steps=2",
    "client.momentum=0.9",
    "rounds=4",
    "strategy.ticks_per_round=15",
    "strategy.loss=0.1",
    "strategy.online=0.8",
    "strategy.churn=7",
    "strategy.spread=0.4",
    "strategy.inbox=accumulate",
    "strategy.delay=0-9",
)


@pytest.mark.parametrize("every", [1, 2])
def test_killed_with_models_under_way_and_resumed_the_run_ends_with_the_same_bits(
    every: int, tmp_path: Path
) -> None:
    problem, folder, album = classification("bn"), tmp_path / "run", tmp_path / "album"
    settings = ("strategy=gossip_async", *ROUGH, f"checkpoint.every={every}")
    expected = problem.run(*settings, f"dir={folder}", callbacks=[Photographer(folder, album)])
    assert len(set(hashes(expected))) == 4
    assert len(peers_of(expected)["copies"]) > 0
    for killed_after in range(1, 4):
        resumed = problem.run(*settings, f"dir={album / str(killed_after)}")
        assert hashes(resumed) == hashes(expected)
        assert [r["messages"] for r in resumed.rows] == [r["messages"] for r in expected.rows]
    again = problem.run(*settings[:-1], "seed=1")
    assert hashes(again)[0] != hashes(expected)[0]


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bits(ray: str) -> None:
    problem = classification("dropout")
    expected = problem.run("strategy=gossip_async", *ROUGH)
    for workers in (1, 2, 3):
        parallel = problem.run("strategy=gossip_async", *ROUGH, ray, f"engine.workers={workers}")
        assert hashes(parallel) == hashes(expected)
        assert parallel.summary["accuracy"] == expected.summary["accuracy"]


def test_the_log_has_one_row_per_peer_and_all_messages() -> None:
    result = classification().run("strategy=gossip_async", *ROUGH)
    for row in result.rows:
        of = result.per_client.query(f"round == {row['round']} and metric == 'trainings'")
        assert sorted(of.client) == list(range(6)) and of.value.sum() == row["trainings"]
        sent = result.per_client.query(f"round == {row['round']} and metric == 'bytes_up'").value.sum()
        assert sent == row["bytes_up"] == row["messages"] * ((53 - 10) * 4 + 8)
        assert row["exchanges"] <= row["trainings"] and row["ticks"] == 15 * row["round"]
    total = {k: sum(r[k] for r in result.rows) for k in ("bytes_up", "bytes_down", "messages_lost")}
    assert total["messages_lost"] > 0 and total["bytes_down"] < total["bytes_up"]


def rules(**changes: Any) -> Rules:
    parts: dict[str, Any] = {
        "interval": UniformInts(8, 12),
        "delay": Constant(0),
        "spread": 0.0,
        "loss": 0.0,
        "online": 1.0,
        "churn": 100.0,
        "trigger": "count",
        "fill": 1.0,
        "inbox": "accumulate",
        "fanout": None,
        "nbytes": 1000,
    }
    return Rules(**{**parts, **changes})


def test_trainings_of_several_ticks_share_an_exchange() -> None:
    """The authors' ticks: 50 peers on an 8-regular graph, 5 trainings a tick; waiting for mixes joins ticks."""
    graph = topology.random_regular(50, 0, degree=8, connected="retry")
    agenda = Planner(graph, rules(), 0).plan(100)
    trainings = sum(map(len, agenda.trainings))
    stages = sum(map(bool, agenda.trainings))
    assert 450 <= trainings <= 550 and stages < 60
    for stage in agenda.trainings:
        assert len({t.peer for t in stage}) == len(stage)
    quiet = Planner(graph, rules(loss=0.999), 0).plan(100)
    assert (
        sum(map(bool, quiet.trainings)) <= 13
    )  # nobody waits for anybody: as many stages as a peer's trainings


def test_peers_keep_their_pace_and_nothing_depends_on_the_window() -> None:
    graph = topology.ring(6)
    whole = Planner(graph, rules(spread=0.7), 3)
    agenda = whole.plan(300)
    parts = Planner(graph, rules(spread=0.7), 3)
    pieces = []
    for until in range(30, 301, 30):
        pieces.append(parts.plan(until))
        parts = Planner(graph, rules(spread=0.7), 3, parts.saved())
    assert parts.saved() == whole.saved()
    assert parts.turns == whole.turns and len(set(whole.turns)) > 3
    mixes = [
        [(m.peer, m.copies, m.time) for waves in p.mixes for w in waves for m in w] for p in [agenda, *pieces]
    ]
    assert Counter(mixes[0]) == Counter(m for piece in mixes[1:] for m in piece)


def test_an_offline_peer_neither_trains_nor_hears() -> None:
    graph = topology.complete(8)
    always = Planner(graph, rules(), 0).plan(400)
    half = Planner(graph, rules(online=0.5, churn=20), 0).plan(400)
    trained = [sum(map(len, a.trainings)) for a in (always, half)]
    assert 0.35 < trained[1] / trained[0] < 0.65
    assert always.lost == 0 and 0.35 < half.lost / half.sent.total() < 0.65


def test_messages_take_time_get_lost_and_go_to_some_neighbours() -> None:
    graph = topology.complete(6)
    late = Planner(graph, rules(delay=Link(50, 100)), 0)  # 50 + 1000 / 100 ticks
    agenda = late.plan(60)
    assert not agenda.received and agenda.sent.total() > 0
    assert late.plan(75).received.total() > 0
    some = Planner(graph, rules(fanout=2), 0).plan(100)
    assert some.sent.total() == 2 * sum(map(len, some.trainings))
    lossy = Planner(graph, rules(loss=0.3), 0).plan(600)
    assert abs(lossy.lost / lossy.sent.total() - 0.3) < 0.05


def test_durations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    assert set(UniformInts(8, 12)(rng, 0, 500, 0)) == {8.0, 9.0, 10.0, 11.0, 12.0}
    draws = LognormalTicks(10, 0.5)(rng, 0, 4000, 0)
    assert np.median(draws) == pytest.approx(10, rel=0.05) and np.log(draws).std() == pytest.approx(
        0.5, rel=0.05
    )
    assert Link(2, 100)(rng, 0, 2, 500).tolist() == [7.0, 7.0]
    (tmp_path / "p.txt").write_text("3\n4.5\n")
    assert Profile(str(tmp_path / "p.txt"))(rng, 1, 1, 0).tolist() == [4.5]
    with pytest.raises(ConfigError, match="holds 2 numbers; peer 2"):
        Profile(str(tmp_path / "p.txt"))(rng, 2, 1, 0)
    for make in (
        lambda: UniformInts(3, 2),
        lambda: Constant(-1),
        lambda: LognormalTicks(0, 1),
        lambda: Link(0, 0),
    ):
        with pytest.raises(ConfigError):
            make()
    with pytest.raises(ConfigError, match=r"none\.txt"):
        Profile(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*PEERS, "strategy.interval=[1,2,3]"), r"strategy.interval=.*expected a number of ticks"),
        ((*PEERS, "strategy.trigger=never"), "strategy.trigger=never: choose one of count"),
        ((*PEERS, "strategy.fill=2"), "strategy.fill=2.*never holds more than one model per neighbour"),
        ((*PEERS, "strategy.online=0"), "strategy.online=0"),
        ((*PEERS, "strategy.interval=0"), "strategy.interval: gave peer 0 0.0 ticks"),
        ((*PEERS, "system=lognormal"), "system: asynchronous peers have times of their own"),
        (
            (*PEERS, "topology=time_varying", "strategy.mixing=metropolis"),
            "metropolis: needs an undirected graph",
        ),
    ],
)
def test_impossible_settings_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run("strategy=gossip_async", *overrides)
