"""Secure sums in whole runs: integer sums of weighted updates, void rounds, bytes of the legs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hooks import hooked
from problems import Recorded, classification, method

from fedsim.errors import ClientError, ConfigError, EngineError, StrategyError
from fedsim.exchange.payload import Outcome
from fedsim.exchange.secagg import neighbours, ring_levels, to_levels
from fedsim.exchange.summing import MAX_WEIGHT, WEIGHTED, SecureSums, void
from fedsim.rng import torch_rng
from strategies.fedavg import FedAvg

RING = ("secagg=ring", "secagg.reach=1")
MASKS = ("secagg=masks", "secagg.reach=1")
FRAME = 8 + 43 * 4  # bytes of 43 residues of 32 bits


def hashes(result: Any) -> list[str]:
    return [row["weights_hash"] for row in result.rows]


def draws(stage: str) -> torch.Generator:
    return torch_rng(0, stage)


def test_a_weighted_mean_is_that_of_integers() -> None:
    secure = SecureSums(bits=24, reach=2.0, most=4)
    said = {WEIGHTED: ["delta"], MAX_WEIGHT: 10.0}
    rng, L = np.random.default_rng(0), ring_levels(24, 4)
    vectors, weights = rng.normal(scale=0.5, size=(3, 5)), [10.0, 3.0, 7.0]
    entered = [
        secure.enter("delta", torch.from_numpy(v), None, draws, secure.factor("delta", w, said))
        for v, w in zip(vectors, weights, strict=True)
    ]
    expected = sum(to_levels(v * (w / 10), 2.0, L).q for v, w in zip(vectors, weights, strict=True))
    total = sum(q for q, _ in entered)
    assert total.tolist() == expected.tolist() and [s for _, s in entered] == [0, 0, 0]
    mean = secure.leave("delta", total, None) / secure.denominator("delta", weights, said)
    np.testing.assert_allclose(mean, np.average(vectors, axis=0, weights=weights), atol=1e-5)
    assert secure.denominator("c", weights, said) == 3 and secure.factor("c", 99, said) == 1
    for q, _ in entered:
        assert torch.equal(secure.opened(secure.frame(q), 5), q)
    with pytest.raises(ClientError, match="weighs 11"):
        secure.factor("delta", 11, said)
    with pytest.raises(ClientError, match="wrap"):
        secure.opened(secure.frame(torch.full((5,), L + 1)), 5)


@pytest.mark.parametrize("round", ["nearest", "stochastic"])
def test_levels_of_a_clipped_vector_are_no_longer_than_the_bound(round: str) -> None:
    """Rounding lengthens by up to step sqrt(d)/2, stochastic step sqrt(d); the noise is made for the bound."""
    secure = SecureSums(bits=16, most=20, round=round)
    for seed in range(20):
        v = np.random.default_rng(seed).normal(size=400)
        q, beyond = secure.enter("delta", torch.from_numpy(v / np.linalg.norm(v) * 3), 3.0, draws)
        length = float(secure.leave("delta", q, 3.0).norm())
        assert 2.9 < length <= 3.0 and beyond == 0
    with pytest.raises(ClientError, match="more bits"):
        SecureSums(bits=8, most=20).enter("delta", torch.ones(400), 3.0, draws)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "fedadam"])
def test_close_to_the_plain_run_and_the_same_in_any_chunks(strategy: str) -> None:
    """Integer sums depend on no order: other chunks, same bits."""
    plain = classification().run(f"strategy={strategy}")
    secure = classification().run(f"strategy={strategy}", *RING)
    for name, w in plain.weights.items():
        np.testing.assert_allclose(secure.weights[name], w, atol=1e-4)
    assert all(row["saturated"] == 0 for row in secure.rows)
    assert hashes(classification().run(f"strategy={strategy}", *RING, "engine.chunks=1")) == hashes(secure)
    vectors = 2 if strategy == "scaffold" else 1
    assert all(row["bytes_up"] == len(row["cohort"]) * (vectors * FRAME + 8) for row in secure.rows)


def test_masks_give_the_bits_of_the_ring_and_count_their_legs() -> None:
    ring, masks = classification().run(*RING), classification().run(*MASKS)
    assert hashes(ring) == hashes(masks)
    up, down = 64 + 152 * 2 + 52 * 3, 64 * 2 + 152 * 2 + 8 * 3  # each of three clients has two neighbours
    for a, b in zip(ring.rows, masks.rows, strict=True):
        weight = 8 + 4 - 8  # in fixed point, in a frame of its own, in the place of the value
        assert b["bytes_up"] - a["bytes_up"] == 3 * (up + weight)
        assert b["bytes_down"] - a["bytes_down"] == 3 * down


def test_masks_hide_weights_but_where_all_are_alike() -> None:
    """What nobody sees is in no row; who reads single weights is told so."""
    shown = classification().run(*RING).per_client.query("metric == 'weight'").value
    hidden = classification().run(*MASKS).per_client.query("metric == 'weight'").value
    assert set(hidden) == {1.0} and max(shown) > 1
    with pytest.raises(ConfigError, match=r"FedNova reads what single clients weigh.*weighting=uniform"):
        classification().run(*MASKS, "strategy=fednova", "strategy.weighting=samples")
    classification().run(*MASKS, "strategy=fednova", "strategy.weighting=uniform", "rounds=1")
    strategy = FedAvg(server_lr=1.0, weighting="samples")
    reads = type("Reads", (FedAvg,), {"update": lambda self, state, replies, round: replies.weights})
    with pytest.raises(StrategyError, match="hides what single clients weigh"):
        classification().run(*MASKS, strategy=reads(server_lr=1.0, weighting="samples"))
    assert hashes(classification().run(*MASKS, strategy=strategy)) == hashes(classification().run(*RING))


SHARED = ("compression=random_k", "compression.shared=true", "compression.rate=0.2")


@pytest.mark.parametrize("more", [(), ("compression.scale=contractive",), ("strategy=scaffold",)])
def test_places_in_common_are_summed_alone(more: tuple[str, ...]) -> None:
    """k = 9 residues a vector travel, of the numbers that a run without the ring sums at these places."""
    plain = classification().run(*SHARED, *more)
    far = "secagg.reach=20"  # d/k times what is sent whole
    ring, masks = (classification().run(*SHARED, *more, *one, far) for one in (RING, MASKS))
    for name, w in plain.weights.items():
        np.testing.assert_allclose(ring.weights[name], w, atol=1e-4)
    assert (
        hashes(ring)
        == hashes(masks)
        == hashes(classification().run(*SHARED, *more, *RING, far, "engine.chunks=1"))
    )
    vectors = 2 if "strategy=scaffold" in more else 1
    assert all(row["bytes_up"] == len(row["cohort"]) * (vectors * (8 + 9 * 4) + 8) for row in ring.rows)
    moved = torch.cat([w.flatten() for w in classification().run(*SHARED, "rounds=1").weights.values()])
    start = torch.cat(
        [w.flatten() for w in classification().run("client.lr=1e-30", "rounds=1").weights.values()]
    )
    assert int((moved != start).sum()) == 9  # of one round all clients' places are the same


def test_a_cohort_that_is_too_large_for_the_ring_is_not_asked() -> None:
    problem = classification(cohorts=[[0, 1, 2, 3]])
    with pytest.raises(EngineError, match=r"4 clients.*type secagg.most=4"):
        problem.run(*RING, "rounds=1")
    assert problem.run(*RING, "rounds=1", "secagg.most=4").rows[0]["saturated"] == 0


def test_a_reach_that_is_too_small_is_counted() -> None:
    assert classification().run("secagg=ring", "secagg.reach=1e-4").rows[0]["saturated"] > 0


def test_too_few_survivors_make_a_round_void() -> None:
    """t = 2 of 3: with two lost the server can unmask nothing; the model and all states stay."""

    def lost(job: Any) -> None:
        if job.round == 1 and job.client != 2:
            raise RuntimeError("lost")

    strategy = hooked("scaffold", lost)
    problem = classification(cohorts=[[0, 1, 2]] * 3, settings=("rounds=3", "client.epochs=1"))
    result = problem.run(*MASKS, "clients_per_round=3", "failures.policy=skip", strategy=strategy)
    assert [row.get("secagg") for row in result.rows] == [None, "void", None]
    assert hashes(result)[1] == hashes(result)[0] != hashes(result)[2]
    assert torch.equal(strategy.states[0]["c"], strategy.states[1]["c"])
    (first, second) = (kept[2] for kept in strategy.kept[:2])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_with_neighbours_enough_of_them_must_answer() -> None:
    """Each of 9 clients masks with 4; the shares of a secret lie with these, t = 4 of 5."""
    secure, cohort = SecureSums(masks=True, neighbours=4, most=9), range(9)
    near = neighbours(cohort, 4, 0, 3)

    def why(*lost: int) -> str:
        return void(secure, cohort, [Outcome(c, "dropped" if c in lost else "ok") for c in cohort], 0, 3)

    assert secure.enough(9) == 4 and why() == why(0) == ""
    assert "3 neighbours of client" in why(*near[0][:2]) and "3 of 9 clients" in why(*range(6))


def test_counts_of_classes_are_summed_as_whole_numbers() -> None:
    """The prior of all is that of a run without secure sums, and masks change no bit."""
    plain, ring, masks = (Recorded(method("logit_adjust", "strategy.prior=all")) for _ in range(3))
    for strategy, option in ((plain, ()), (ring, RING), (masks, MASKS)):
        classification().run("rounds=1", *option, strategy=strategy)
    assert torch.equal(plain.states[0]["prior"], ring.states[0]["prior"])
    assert torch.equal(ring.states[0]["w"], masks.states[0]["w"])
    secure = SecureSums(bits=8, most=4)
    assert secure.counts(secure.count("counts", torch.tensor([31, 0, 7])) * 4).tolist() == [124, 0, 28]
    for bad in (torch.tensor([32]), torch.tensor([1.0])):
        with pytest.raises(ClientError, match=r"whole numbers up to 31, what secagg.bits=8"):
            secure.count("counts", bad)
