"""What leaves a node: frames travel, the server decodes them before the fold, and believes none of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import asked, deploy
from test_local import SMALL, check_twin

from fedsim.errors import ConfigError

RING = ("secagg=ring", "secagg.reach=1")
DOWN = "compression.down={codec: qsgd, levels: 127}"
TWINS = (
    ("strategy=scaffold", "compression=top_k", DOWN),
    ("strategy=feddyn", *RING),
)
MORE = (
    ("strategy=fedavg", "compression=qsgd", "compression.feedback=true"),
    ("strategy=fedavg", "compression=rotate", "model=mlp"),
    ("strategy=fedavg", "compression=random_k", "compression.scale=contractive"),
    ("strategy=fedavg", "compression=low_rank", "compression.rank=1"),
    ("strategy=fedavg", "compression=sign"),
)


@pytest.mark.parametrize(
    "given",
    [*TWINS, *(pytest.param(g, marks=pytest.mark.nightly) for g in MORE)],
    ids=lambda g: "-".join(g[:2]),
)
def test_bits_and_bytes_are_those_of_the_simulation(given: tuple[str, ...], tmp_path: Path) -> None:
    """Residuals lie at the nodes, as all client states do."""
    check_twin(tmp_path, *SMALL, *given)


def replaced(change: Any) -> Any:
    """Changes the frame of client 1 in round 1 on its way."""

    def alter(message: Any, content: Any) -> None:
        if asked(message) == (1, 1):
            record = content["outcome.update"]
            frame = record["=delta"].numpy().copy()
            content["outcome.update"] = ArrayRecord({"=delta": Array(change(frame))})

    return alter


def shorter(frame: Any) -> Any:
    return frame[:-1]


def other_codec(frame: Any) -> Any:
    frame[0] = 3
    return frame


def huge(frame: Any) -> Any:
    frame[4:8] = 255
    return frame


def as_numbers(frame: Any) -> Any:
    return frame.astype("float32")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (shorter, "bytes"),
        (other_codec, "codec qsgd; expected top_k"),
        (huge, "entries; expected"),
        (as_numbers, "expected a frame"),
    ],
)
def test_a_frame_that_no_encoder_makes_is_its_clients_failure(change: Any, why: str, tmp_path: Path) -> None:
    result, _ = deploy(
        tmp_path, *SMALL, "rounds=1", "clients_per_round=3", "compression=top_k", "failures.policy=skip",
        alter=replaced(change),
    )  # fmt: skip
    (row,) = result.rows
    assert [f["client"] for f in row["failures"]] == [1] and why in row["failures"][0]["reason"]


def test_masks_are_simulated_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="secagg=masks"):
        deploy(tmp_path, *SMALL, "secagg=masks", "secagg.reach=1")
