"""Noise that clients add below the ring, each a share: its size, its bits, rounds with too few shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks import hooked
from problems import Problem, classes, classification, hashes, network

from fedsim.errors import ConfigError
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.summing import SecureSums
from fedsim.rng import torch_rng

SHARES = (
    "privacy=client",
    "privacy.where=distributed",
    "privacy.z=1.5",
    "privacy.delta=1e-2",
    "privacy.clip=0.2",
    "strategy.weighting=uniform",
)
RING, MASKS = (*SHARES, "secagg=ring"), (*SHARES, "secagg=masks")


def test_two_of_three_shares_are_the_noise_of_the_budget() -> None:
    """Updates are zero: the model walks by std zC sqrt(3/2)/3 an entry, where two shares are enough and three came."""
    seen: list[torch.Tensor] = []

    class Watcher:
        def round(self, info: Any) -> None:
            seen.append(info.models["global"].w.double().clone())

    settings = ("rounds=100", "clients_per_round=3", "client.steps=1", "dtype=float64", "client.lr=1e-30")
    Problem(network(), classes(), settings).run(*RING, callbacks=[Watcher()])
    steps = torch.stack(seen).diff(dim=0)
    steps = steps[:, steps.abs().sum(0) > 0]  # without padding
    deviation = 1.5 * 0.2 * (3 / 2) ** 0.5 / 3
    assert steps.shape == (99, 43) and float(steps.std()) == pytest.approx(deviation, rel=0.03)
    assert abs(float(steps.mean())) < 4 * deviation / steps.numel() ** 0.5


def test_levels_are_those_of_the_vector_and_of_the_noise() -> None:
    """Each rounded by itself: the sum is off by half a step twice, and eight deviations do not saturate."""
    privacy = Privacy(level="client", z=2.0, delta=1e-3, where="distributed", least=4)
    spread = privacy.own_spread(1.0, 2)
    assert spread == pytest.approx(2 * 2**0.5 / 4**0.5)
    secure, rng = SecureSums(bits=32, most=5), np.random.default_rng(0)
    v, noise = (
        torch.from_numpy(x) for x in (rng.normal(size=50) / 10, rng.normal(scale=spread, size=50).clip(-8, 8))
    )
    levels, beyond = secure.enter("delta", v, 1.0, lambda s: torch_rng(0, s), noise=noise, spread=spread)
    step = (1 + 8 * spread) / secure.ring.L
    found, bounded = secure.leave("delta", levels, 1.0, spread), v / max(1.0, float(v.norm()))
    np.testing.assert_allclose(found, bounded + noise, atol=step * 4)
    assert beyond == 0
    far = torch.full((50,), 10 * spread, dtype=torch.float64)
    levels, beyond = secure.enter("delta", v, 1.0, lambda s: torch_rng(0, s), noise=far, spread=spread)
    assert beyond > 0 and int(levels.abs().max()) == secure.ring.L


def test_bits_hang_on_no_chunks_and_rows_do_not_claim_what_is_not_proved(tmp_path: Path) -> None:
    ring, masks = (
        classification().run(*one, f"dir={tmp_path / str(i)}") for i, one in enumerate((RING, MASKS))
    )
    assert hashes(ring) == hashes(masks) == hashes(classification().run(*RING, "engine.chunks=1"))
    assert all(r["epsilon_valid"] is False and r["noise_norm"] is r["clipped"] is None for r in ring.rows)
    trusted = classification().run(*RING, "privacy.where=server")
    assert [r["epsilon"] for r in trusted.rows] == [r["epsilon"] for r in ring.rows]
    assert hashes(trusted) != hashes(ring)
    said = {k for line in (tmp_path / "0/clients.jsonl").read_text().splitlines() for k in json.loads(line)}
    assert not any("fits" in k for k in said)


def test_too_few_shares_make_a_round_void_and_cost_nothing(tmp_path: Path) -> None:
    def lost(job: Any) -> None:
        if job.round == 1 and job.client != 2:
            raise RuntimeError("lost")

    problem = classification(cohorts=[[0, 1, 2]] * 3, settings=("rounds=3", "client.epochs=1"))
    words = ("clients_per_round=3", "failures.policy=skip", f"dir={tmp_path / 'run'}")
    given = [one for one in RING if not one.startswith("strategy")]
    result = problem.run(*given, *words, strategy=hooked("fedavg", lost, "strategy.weighting=uniform"))
    assert [row.get("secagg") for row in result.rows] == [None, "void", None]
    told = "no update counted: 2 failed, 1 in a sum of too few (client 0: "
    assert result.rows[1]["thin_round"].startswith(told)
    spent = [row["epsilon"] for row in result.rows]
    assert 0 < spent[0] == spent[1] < spent[2]
    assert hashes(result)[1] == hashes(result)[0] != hashes(result)[2]
    ledger = [json.loads(line) for line in (tmp_path / "run/privacy.jsonl").read_text().splitlines()]
    assert [line["round"] for line in ledger] == [1, 3]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (SHARES, "type secagg=masks"),
        ((*MASKS, "secagg.neighbours=2"), r"leave secagg\.neighbours out"),
        ((*MASKS, "participation=bernoulli"), "shares would be too few"),
        ((*MASKS, "privacy.least=1"), "more than half"),
        ((*MASKS, "privacy.least=9"), "at most all 3"),
    ],
)
def test_shares_that_hide_nothing_are_refused_before_round_1(given: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        classification(cohorts=None).run(*given)
