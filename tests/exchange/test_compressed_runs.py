"""Compression in whole runs: golden rounds with feedback, bytes counted, residuals, the down-link, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks import hooked
from problems import GOLDEN, Problem, Quadratic, Recorded, classification, linear_loss, method

from fedsim.errors import ClientError, ConfigError
from fedsim.exchange.codecs import QSGD, Float16, StageDraws
from fedsim.exchange.codecs.rotation import flat_reach
from fedsim.rng import torch_rng

SIZE = 43  # numbers of the little network: (4 + 1) 5 + (5 + 1) 3
FRAMES = {  # bytes of one update of the little network, header included
    ("top_k", "compression.rate=0.1"): 8 + 4 * 5 + 4,
    ("random_k", "compression.rate=0.1"): 8 + 4 * 5,
    ("qsgd",): 8 + 4 + 22,
    ("qsgd", "compression.levels=1", "compression.bucket=16"): 8 + 4 * 3 + 11,
    ("sign",): 8 + 4 + 6,
    ("rotate",): 8 + 4 + 8,
    ("low_rank", "compression.rank=1"): 8 + 4 * (9 + 8 + 8),
}
HASHES = "weights_hash"


def settings(option: tuple[str, ...]) -> list[str]:
    return [f"compression={option[0]}", *option[1:]]


def hashes(result: Any) -> list[str]:
    return [row[HASHES] for row in result.rows]


def golden_problem() -> tuple[Problem, dict[str, np.ndarray]]:
    """Clients with 1/2 |A_i x - b_i|^2 as one sample each."""
    with np.load(GOLDEN / "release/feedback.npz") as file:
        z = dict(file)
    clients = [
        (torch.tensor(A.T @ A)[None], torch.tensor(A.T @ b)[None])
        for A, b in zip(z["A"], z["b"], strict=True)
    ]
    cohorts = [np.flatnonzero(row).tolist() for row in z["active"]]
    given = (
        "dtype=float64", f"rounds={len(cohorts)}", "client.batch_size=1", f"client.epochs={z['E']}",
        f"client.lr={z['lr']}", "strategy.weighting=uniform",
    )  # fmt: skip
    problem = Problem(Quadratic(10), clients, given, linear_loss, None, {"x": torch.zeros(10)}, cohorts)
    return problem, z


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ((), "x"),
        (("compression.feedback=false",), "x_plain"),
        (("compression.feedback_decay=0.5",), "x_decay_half"),
    ],
)
def test_golden_rounds_with_feedback(option: tuple[str, ...], key: str) -> None:
    problem, z = golden_problem()
    strategy = Recorded(method("fedavg", "strategy.weighting=uniform"))
    result = problem.run("compression=top_k", "compression.rate=0.1", *option, strategy=strategy)
    np.testing.assert_allclose([state["w"].numpy() for state in strategy.states], z[key], atol=1e-10)
    if key == "x":
        kept = [state["release/residual/delta"].numpy() for state in strategy.kept[-1]]
        np.testing.assert_allclose(kept, z["residual"][-1], atol=1e-10)
    assert [row["bytes_up"] for row in result.rows] == [
        len(row["cohort"]) * (8 + 4 + 1 + 8) for row in result.rows
    ]  # one place of 4 bits, one value, and the weight


@pytest.mark.parametrize("option", list(FRAMES), ids="-".join)
def test_bytes_are_those_of_the_frames(option: tuple[str, ...]) -> None:
    result = classification().run(*settings(option))
    assert all(row["bytes_up"] == len(row["cohort"]) * (FRAMES[option] + 8) for row in result.rows)
    plain = classification().run()
    assert all(row["bytes_up"] == len(row["cohort"]) * (4 * SIZE + 8) for row in plain.rows)
    assert [row["cohort"] for row in plain.rows] == [row["cohort"] for row in result.rows]
    assert hashes(result) != hashes(plain)


def test_all_of_an_update_is_float32_and_changes_no_bit() -> None:
    """k = d is no shorter: the frame is float32, and float32 runs lose nothing."""
    plain = classification().run()
    whole = classification().run("compression=top_k", "compression.rate=1")
    assert hashes(whole) == hashes(plain)
    assert whole.rows[0]["bytes_up"] == plain.rows[0]["bytes_up"] + 8 * len(plain.rows[0]["cohort"])


@pytest.mark.parametrize("option", [("top_k", "compression.rate=0.1"), ("qsgd",)], ids="-".join)
def test_resumed_runs_and_other_chunks_keep_residuals(option: tuple[str, ...], tmp_path: Path) -> None:
    through = classification().run(*settings(option))
    first = classification().run(*settings(option), "rounds=2", f"dir={tmp_path}", "checkpoint.every=1")
    again = classification().run(*settings(option), f"dir={tmp_path}", "checkpoint.every=1")
    assert hashes(first) == hashes(through)[:2] and hashes(again) == hashes(through)
    vectorised = classification().run(*settings(option), "engine.vectorize=off")
    assert [row["cohort"] for row in vectorised.rows] == [row["cohort"] for row in through.rows]


def test_the_down_link() -> None:
    """Clients start from the decoded model, the server moves its exact one; what is sent down is the frame."""
    option = ("compression=top_k", "compression.rate=1", "compression.down={codec: qsgd, levels: 127}")
    problem = classification(settings=("rounds=1", "clients_per_round=3", "client.lr=1e-30"))
    result = problem.run(*option)
    assert all(row["bytes_down"] == len(row["cohort"]) * (8 + 4 + SIZE) for row in result.rows)
    assert hashes(result) == hashes(problem.run())  # no step that float32 could tell: deltas are zero
    seen = list[torch.Tensor]()
    noting = hooked("fedavg", lambda job: seen.append(job.model.layout.compact(job.message.arrays["w"])))
    problem.run(*option, strategy=noting)
    draws = StageDraws(lambda stage: torch_rng(0, f"release/down/w/{stage}", 0))
    start = torch.cat([p.detach().flatten() for p in problem.model.parameters()])
    expected = QSGD(127).decode(QSGD(127).encode(start, draws), draws)
    assert torch.equal(seen[0], expected.float()) and not torch.equal(seen[0], start)


def test_the_down_link_in_half_precision() -> None:
    """As NumPy rounds; two bytes an entry."""
    w = np.array([1.0, -1 / 3, 65504.0, 1e-9, 0.0, 2049.0])
    frame = Float16().encode(w)
    assert len(frame) == Float16().size(6) == 20 and frame[:8] == bytes([0, 16, 0, 0, 6, 0, 0, 0])
    none = StageDraws(lambda stage: torch_rng(0, stage))
    np.testing.assert_array_equal(Float16().decode(frame, none).numpy(), w.astype(np.float16).astype(float))
    with pytest.raises(ClientError, match="above 65504"):
        Float16().encode([65520.0])
    rows = classification().run("compression=sign", "compression.down={codec: float16}").rows
    assert all(row["bytes_down"] == len(row["cohort"]) * (8 + 2 * SIZE) for row in rows)


@pytest.mark.parametrize("more", [("secagg=ring", "secagg.bits=16"), ("secagg=masks",)])
def test_rotated_vectors_are_summed_without_codes(more: tuple[str, ...]) -> None:
    """Their sum, rotated back, is that of the vectors themselves, to the ring's finer steps."""
    private = ("privacy=client", "privacy.z=0", "privacy.delta=1e-2", "strategy.weighting=uniform")
    plain = classification().run(*private)
    summed = classification().run(*private, *more, "compression=rotate", "compression.shared=true")
    lengths = [[row["sum_norm"] for row in run.rows] for run in (summed, plain)]
    np.testing.assert_allclose(*lengths, rtol=1e-3 if "secagg.bits=16" in more else 1e-6)
    assert {row["saturated"] for row in summed.rows} == {0}
    assert flat_reach(64, 3) == pytest.approx(math.sqrt(2 * math.log(2 * 64 * 3) / 64))


def test_residuals_are_kept_with_accepted_updates_only() -> None:
    """A client that fails in the round after it took part keeps the residual that it had."""
    problem = classification(cohorts=[[0, 1], [0, 1]], settings=("rounds=2", "client.epochs=1"))

    def lost(job: Any) -> None:
        if job.round == 1 and job.client == 0:
            raise RuntimeError("lost")

    strategy = hooked("fedavg", lost)
    problem.run("compression=top_k", "compression.rate=0.1", "failures.policy=skip", strategy=strategy)
    first, second = ([state.get("release/residual/delta") for state in kept[:3]] for kept in strategy.kept)
    assert first[2] is second[2] is None
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


REFUSED = (
    (("compression=top_k", "compression.rate=0"), r"compression.rate=0.*\(0, 1\]"),
    (("compression=qsgd", "compression.levels=128"), "compression.levels=128"),
    (("compression=qsgd", "compression.bucket=100"), "power of two"),
    (("compression=rotate", "compression.bits=5"), "compression.bits=5"),
    (("compression=sign", "compression.feedback_decay=2"), "compression.feedback_decay=2"),
    (("compression=sign", "compression.only=[c]"), "sends no vector 'c'; it sends delta"),
    (("compression=sign", "compression.down={codec: top_k, rate: 0}"), r"compression.down.rate=0.*\(0, 1\]"),
    (("+compression.down={codec: top_k}",), "compression.down: nothing reads it while compression is none"),
    (("+privacy.z=1",), "privacy.z: nothing reads it.*privacy=..., one of client"),
    (("compression=sign", "compression.down={codec: nonzero}"), "must be one of qsgd, rotate"),
    (("compression=sign", "compression.down={codec: top_k, standing: false}"), "clients must hold the rest"),
    (("compression=sign", "compression.down={codec: qsgd, standing: true}"), "sends every entry of a model"),
    (("compression=sign", "compression.down={codec: random_k, scale: unbiased}"), "would overshoot"),
    (
        ("compression=sign", "compression.down={codec: top_k}", "strategy=fedasync", "system=lognormal"),
        "sends its model to one client at a time",
    ),
    (("compression=sign", "compression.down={codec: qsgd, bits: 3}"), "must be one of levels"),
    (
        ("compression=sign", "compression.down={codec: qsgd, levels: 2.5}"),
        "levels=2.5: must be a whole number",
    ),
    (("compression=sign", "compression.down=qsgd"), "must be a codec with its options"),
    (("compression=sign", "compression.only=[]"), "must name a vector"),
    (("compression=rotate", "secagg=ring", "secagg.reach=1"), "compression=rotate compression.shared=true"),
    (
        ("compression=rotate", "compression.shared=true", "secagg=ring", "secagg.reach=1"),
        "needs a bound of lengths.*type privacy=client",
    ),
    (("compression=qsgd", "secagg=ring", "secagg.reach=1"), "a compressed update cannot be masked"),
    (("compression=qsgd", "strategy=centralised"), "all samples in one place"),
    (("secagg=ring",), "secagg.reach is missing"),
    (("secagg=ring", "secagg.reach=1", "secagg.bits=70"), r"secagg.bits=70.*8\.\.62"),
    (("secagg=ring", "secagg.reach=1", "aggregator=coordinate_median"), "looks at single updates"),
    (("secagg=ring", "secagg.reach=1", "attack=alie"), "sees all honest updates"),
    (("secagg=ring", "secagg.reach=1", "strategy=gossip", "topology=ring"), "one by one"),
    (("secagg=ring", "secagg.reach=1", "strategy=fedasync", "system=lognormal"), "one by one"),
    (
        ("secagg=ring", "secagg.reach=1", "strategy=fedproto", "strategy.share=model"),
        "a statistic|single updates",
    ),
    (("secagg=masks", "secagg.reach=1", "secagg.threshold=1"), "above half of 3"),
    (("secagg=masks", "secagg.reach=1", "secagg.neighbours=3"), "must be even"),
)


@pytest.mark.parametrize(("given", "why"), REFUSED, ids=lambda x: "-".join(x) if isinstance(x, tuple) else "")
def test_what_makes_no_sense_is_refused_before_round_1(given: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        classification().run(*given)


def test_zstd_goes_with_neither_privacy_nor_secagg() -> None:
    pytest.importorskip("zstandard")
    small = classification().run("compression=qsgd", "compression.levels=127", "compression.zstd=true")
    assert hashes(small) == hashes(classification().run("compression=qsgd", "compression.levels=127"))
    with pytest.raises(ConfigError, match="tells about the samples"):
        classification().run("compression=qsgd", "compression.zstd=true", "secagg=ring", "secagg.reach=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [
        ("compression=top_k", "compression.rate=0.1", "compression.down={codec: rotate, bits: 4}"),
        *(
            pytest.param(given, marks=pytest.mark.nightly)
            for given in (
                ("compression=qsgd", "compression.feedback=true", "client.momentum=0.9"),
                ("secagg=masks", "secagg.reach=1", "strategy=scaffold"),
                ("compression=sign", "compression.down={codec: top_k, rate: 0.1}"),
            )
        ),
    ],
    ids=lambda o: o[0],
)
def test_any_workers_give_the_same_bits(ray: str, option: tuple[str, ...]) -> None:
    problem = classification()
    alone = problem.run(*option)
    for workers in (1, 2):
        result = problem.run(*option, ray, f"engine.workers={workers}")
        assert hashes(result) == hashes(alone)
        for way in ("bytes_up", "bytes_down"):
            assert [row[way] for row in result.rows] == [row[way] for row in alone.rows]
