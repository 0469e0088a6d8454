"""What compression costs in accuracy on digits: 4810 weights, 20 clients, 60 rounds, three seeds."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import fedsim

pytestmark = pytest.mark.nightly
SETTING = (
    "data=digits", "data.standardise=false", "model=mlp", "model.hidden=[64]", "partition=dirichlet",
    "partition.alpha=0.3", "num_clients=20", "clients_per_round=10", "client.steps=10", "client.batch_size=32",
    "client.lr=0.1", "rounds=60", "evaluation.every=60", "checkpoint.every=0", "engine=serial", "tracker=quiet",
)  # fmt: skip
WEIGHT = 8  # bytes of the weight that travels beside the frame


@cache
def measured(*given: str) -> tuple[float, int]:
    """Mean accuracy after the last round over three seeds, and bytes that one client sends in a round."""
    runs = [fedsim.simulate([*SETTING, f"seed={seed}", *given]) for seed in range(3)]
    first = runs[0].rows[0]
    return float(np.mean([run.rows[-1]["accuracy"] for run in runs])), first["bytes_up"] // 10 - WEIGHT


def test_one_entry_in_a_hundred_with_feedback() -> None:
    """At least .91, .03 above no feedback, at one 68th of the bytes."""
    accuracy, size = measured("compression=top_k")
    without, _ = measured("compression=top_k", "compression.feedback=false")
    dense = measured()[1]
    assert (dense, size) == (4 * 4810, 284) and round(dense / size) == 68
    assert accuracy >= 0.91 and accuracy >= without + 0.03


def test_sign_needs_feedback() -> None:
    accuracy, size = measured("compression=sign")
    assert size == 614
    assert accuracy >= measured("compression=sign", "compression.feedback=false")[0] + 0.03


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (("compression=qsgd", "compression.levels=127"), 4858),
        (("compression=qsgd",), 2453),
        (("compression=rotate",), 1036),
        (("compression=rotate", "compression.bits=4"), 4108),
    ],
    ids=lambda g: "-".join(g) if isinstance(g, tuple) else "",
)
def test_dense_codecs_cost_nothing(given: tuple[str, ...], size: int) -> None:
    """Within .02 of sending float32."""
    accuracy, found = measured(*given)
    assert found == size and accuracy >= measured()[0] - 0.02


def test_stale_residuals_of_a_sparse_codec_do_not_diverge() -> None:
    accuracy, _ = measured("compression=random_k", "compression.scale=contractive", "clients_per_round=5")
    assert accuracy > 0.5
