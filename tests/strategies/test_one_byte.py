"""Just One Byte: rounds rebuilt in NumPy, copies that follow by the log, bytes, draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slopes_by_hand as hand
import torch
from problems import Problem, classes, classification, hashes, method, network

from clients.one_byte import OneByteClient
from fedsim.exchange.payload import Update

ONE = ("strategy=one_byte", "strategy.lr=0.05")
COHORTS = [[0, 1, 2], [0, 2], [0, 1, 2]]  # client 1 is absent in the second round


def by_hand(p: Problem, codec: hand.Codec, lr: float, S: int, nu: str = "mean", weighed: bool = False) -> Any:
    theta = hand.start(p)
    for t, cohort in enumerate(p.cohorts or []):
        n = [len(p.clients[m][1]) if weighed else 1 for m in cohort]
        total = sum(
            w * codec(hand.slope(theta, hand.z("own", t, m, s), p.clients[m])) * hand.z("own", t, m, s)
            for m, w in zip(cohort, n, strict=True)
            for s in range(S)
        )
        K = S * len(cohort)
        theta = theta - lr * (1 if nu == "mean" else K**0.5) * total / (S * sum(n))
    return theta


@pytest.mark.parametrize(
    ("settings", "codec", "options"),
    [
        ((), hand.byte, {}),
        (("strategy.nu=sqrt", "strategy.codec=float32"), hand.single, {"nu": "sqrt"}),
        (("strategy.weighting=samples", "strategy.batch=round"), hand.byte, {"weighed": True}),
    ],
)
def test_three_rounds_with_an_absent_client_are_the_equations(
    settings: tuple[str, ...], codec: hand.Codec, options: dict[str, Any]
) -> None:
    p = hand.problem(COHORTS)
    result = p.run(*ONE, "strategy.samples=2", *settings)
    expected = by_hand(p, codec, 0.05, 2, **options)
    np.testing.assert_allclose(hand.flat(result.weights), expected, rtol=0, atol=1e-8)


def test_bytes_are_the_slopes_and_nothing_else() -> None:
    S, rows = 4, hand.problem([range(3)] * 4).run(*ONE, "strategy.hash_every=3").rows
    assert [r["bytes_up"] for r in rows] == [3 * S] * 4
    assert [r["bytes_down"] for r in rows] == [0, 3 * 3 * S, 3 * 3 * S, 3 * (3 * S + 8)]
    some = hand.problem(COHORTS).run(*ONE).rows  # one more byte a round says who was there
    assert [r["bytes_up"] for r in some] == [3 * S, 2 * S, 3 * S]
    one, two = 3 * S, 2 * S + 1
    assert [r["bytes_down"] for r in some] == [0, 2 * one, 2 * two + (one + 1) + two]
    single = hand.problem([range(3)] * 2).run(*ONE, "strategy.codec=float32").rows
    assert [(r["bytes_up"], r["bytes_down"]) for r in single] == [(12 * S, 0), (12 * S, 3 * 12 * S)]


LATE = [[0, 1], [0, 2], [0, 1, 2], [0], [0, 1, 2, 3], [1, 3], [0, 1, 2, 3, 4]]  # 3 and 4 join late, 2 skips


@pytest.mark.parametrize("ckpt", [50, 1])
def test_copies_that_follow_by_the_log_are_the_one_copy_bit_for_bit(ckpt: int) -> None:
    """Whoever was away, whatever the rate was; every round the copies are compared (a hash each)."""
    settings = (*ONE, f"strategy.ckpt_every={ckpt}", "strategy.hash_every=1", "client.lr_decay=0.7")
    p = classification(cohorts=LATE, settings=("rounds=7", "client.batch_size=4"))
    one, each = (p.run(*settings, f"strategy.replicas={r}") for r in ("one", "each"))
    assert hashes(one) == hashes(each) and len(set(hashes(one))) == 7
    assert [(r["bytes_up"], r["bytes_down"]) for r in one.rows] == [
        (r["bytes_up"], r["bytes_down"]) for r in each.rows
    ]
    assert not any("out_of_sync" in r for r in each.rows)
    size, last, expected = 4 * sum(v.numel() for v in one.weights.values()), dict[int, int](), list[int]()
    for t, cohort in enumerate(LATE):
        since = {c: last.get(c, 0) for c in cohort}
        logs = {c: sum(1 + 4 * len(LATE[r]) for r in range(since[c], t)) for c in cohort}
        down = [size if ckpt == 1 and since[c] < t - 1 else logs[c] for c in cohort]
        expected.append(sum(down) + 8 * len(cohort) * (t > 0))
        last |= dict.fromkeys(cohort, t)
    assert [r["bytes_down"] for r in one.rows] == expected


def test_a_copy_that_differs_says_so_and_is_sent_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = OneByteClient.kept

    def spoilt(self: OneByteClient, job: Any, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        state = kept(self, job, theta)
        return state | {"w": theta + 1} if (job.client, job.round) == (1, 1) else state

    monkeypatch.setattr(OneByteClient, "kept", spoilt)
    p = classification(cohorts=[range(3)] * 5, settings=("rounds=5", "client.batch_size=4"))
    rows = p.run(*ONE, "strategy.hash_every=2", "strategy.replicas=each").rows
    assert [r.get("out_of_sync") for r in rows] == [None, None, [1], None, None]
    without = classification(cohorts=[range(3)] * 2 + [[0, 2]] + [range(3)] * 2, settings=p.settings)
    assert [r["weights_hash"] for r in rows] == hashes(without.run(*ONE, "strategy.hash_every=2"))
    size = 4 * sum(v.numel() for v in network().state_dict().values())
    assert rows[3]["bytes_down"] == size + 2 * (2 * 4 + 1)


def test_each_direction_is_drawn_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import clients.directions as directions

    drawn, generator = [], directions.generator

    def noted(*name: Any) -> np.random.Generator:
        drawn.append(name)
        return generator(*name)

    monkeypatch.setattr(directions, "generator", noted)
    hand.problem([range(3)] * 3).run(*ONE, "strategy.samples=5")
    assert sorted(drawn) == sorted(
        {(0, "own", t, m, s) for t in range(3) for m in range(3) for s in range(5)}
    )


def test_a_loss_that_is_nan_on_one_side_is_a_slope_of_zero(caplog: pytest.LogCaptureFixture) -> None:
    class Half(torch.nn.Linear):
        """NaN where the first weight is above its start."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.weight[0, 0]
            return super().forward(x) + torch.where(first > self.first, torch.nan, 0.0)

    p = hand.problem([[0, 1, 2]])
    model = Half(4, 3)
    model.load_state_dict(p.model.state_dict())  # type: ignore[union-attr]
    model.first = float(model.weight[0, 0].detach())
    with caplog.at_level("WARNING"):
        result = p.run(*ONE, model=model)
    assert result.rows[0]["no_finite_slope"] == [0, 1, 2] and not result.rows[0].get("failures")
    assert "round 1: no slope of clients [0, 1, 2] was finite" in caplog.text
    np.testing.assert_array_equal(hand.flat(result.weights), hand.start(p))


def test_slopes_that_are_not_finite_count_in_k() -> None:
    """A client that sends zeros for that reason: the others' step is as long as with its directions."""

    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, y) + (torch.nan if len(y) == 6 else 0.0)

    p = hand.problem([[0, 1, 2]])
    result = p.run(*ONE, "strategy.samples=2", loss=loss)
    assert result.rows[0]["no_finite_slope"] == [1]
    total = sum(
        hand.byte(hand.slope(hand.start(p), hand.z("own", 0, m, s), p.clients[m])) * hand.z("own", 0, m, s)
        for m in (0, 2)
        for s in range(2)
    )
    np.testing.assert_allclose(hand.flat(result.weights), hand.start(p) - 0.05 * total / 6, rtol=0, atol=1e-8)


def test_the_generator_and_what_travels_are_said() -> None:
    result = hand.problem([range(3)]).run(*ONE)
    assert result.summary["directions"].startswith("Philox4x64-10")
    assert np.__version__ in result.summary["directions"]
    client = method("one_byte", "strategy.lr=0.1").client
    assert set(Update(values={"slopes": b"1234"}, weighs=False).payload.values) == {"slopes"}
    assert client.coding.nbytes(client.samples) == 4


def digits() -> tuple[list[Any], Any]:
    """The problem of the specification: digits / 16, 360 test samples, eight clients alike."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    a, b, c, d = train_test_split(x / 16, y, test_size=360, stratify=y, random_state=0)
    order = np.random.default_rng(0).permutation(len(a))
    parts = np.array_split(order, 8)
    pairs = [(torch.tensor(a[i], dtype=torch.float32), torch.tensor(c[i])) for i in parts]
    return pairs, (torch.tensor(b, dtype=torch.float32), torch.tensor(d))


@pytest.mark.nightly
@pytest.mark.parametrize(("lr", "accuracy", "final"), [(0.02, 0.88, 1.25), (0.05, 0.895, 0.72)])
def test_a_byte_costs_nothing_on_the_digits(lr: float, accuracy: float, final: float) -> None:
    clients, test = digits()
    model = torch.nn.Linear(64, 10)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    settings = ("rounds=400", "clients_per_round=8", "client.batch_size=64", "strategy=one_byte")
    problem, ends = Problem(model, clients, settings, test=test), {}
    for codec in ("float32", "log8", "ref9"):
        ends[codec] = problem.run("strategy.samples=8", f"strategy.lr={lr}", f"strategy.codec={codec}")
        assert ends[codec].summary["accuracy"] >= accuracy
        assert ends[codec].rows[-1]["train_loss"] == pytest.approx(final, rel=0.06)
    for codec in ("log8", "ref9"):
        assert ends[codec].summary["loss"] == pytest.approx(ends["float32"].summary["loss"], rel=0.01)
    assert {r["bytes_up"] for r in ends["log8"].rows} == {64}


@pytest.mark.nightly
def test_a_round_costs_its_forward_passes_and_draws() -> None:
    """Against bare passes of the same module over the same batches, and bare draws, in one process."""
    import time

    from clients.directions import Directions
    from fedsim.task.layout import Layout

    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
    clients, _ = digits()
    problem = Problem(model, clients, ("rounds=30", "clients_per_round=8", "client.batch_size=64", *ONE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = []
        for _ in range(3):
            rows = problem.run("strategy.samples=8").rows
            round_seconds = float(np.median([r["seconds"] for r in rows[5:]]))
            layout, z = Layout(model), None
            like = torch.zeros(layout.dim)
            x, y = clients[0][0][:64], clients[0][1][:64]
            began = time.perf_counter()
            with torch.no_grad():
                for i in range(64):
                    z = Directions(0, "own", layout.params).draw(0, 0, i, like, z)
                    for _side in range(2):
                        float(torch.nn.functional.cross_entropy(model(x), y))
            best.append(round_seconds / (time.perf_counter() - began))
        assert min(best) <= 1.25, best
    finally:
        torch.set_num_threads(threads)


def test_classes_of_the_problem_differ() -> None:
    """What the tests above are about: clients whose slopes are not the same."""
    theta = hand.start(hand.problem([[0]]))
    found = {round(hand.slope(theta, hand.z("own", 0, 0, 0), pair), 6) for pair in classes((5, 6, 4))}
    assert len(found) == 3
