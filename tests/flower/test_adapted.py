"""Methods of adapters, above all those that change their base, on a grid in this process: the bits of a simulation."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import Spoiler, deploy
from test_local import FRAMING, SMALL, simulated

pytest.importorskip("peft", reason="peft is not installed (fedsim[hf])")
IMAGES = "num_channels: 1, image_size: 8, patch_size: 4, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2"
VIT = (
    "model=hf",
    "model.architecture=ViTForImageClassification",
    f"model.config={{{IMAGES}, intermediate_size: 8, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}",
    "model.lora={r: 2, target_modules: [q_proj, v_proj]}",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ("fedex",),
        ("flora", "strategy.ranks=[2, 1]"),
        pytest.param(("fedit",), marks=pytest.mark.nightly),
    ],
    ids=lambda m: m[0],
)
def test_the_base_changes_at_nodes_as_in_a_simulation(method: tuple[str, ...], tmp_path: Path) -> None:
    """Nodes keep their copy of it, and are sent what a simulation prices."""
    settings = (
        tuple(s for s in SMALL if not s.startswith("model=")) + VIT + (f"strategy={method[0]}", *method[1:])
    )
    twin, grid = deploy(tmp_path, *settings)
    alone = simulated(*settings)
    for key in ("weights_hash", "loss", "bytes_up", "bytes_down", "base_change"):
        assert [r.get(key) for r in twin.rows] == [r.get(key) for r in alone.rows], key
    messages = sum(kind == "train" for _, kind, _ in grid.log)
    assert 0 <= grid.bytes_down - sum(r["bytes_down"] for r in twin.rows) <= FRAMING * messages


@pytest.mark.slow
def test_a_node_that_lost_its_copy_of_the_base_says_so_and_is_sent_it(tmp_path: Path) -> None:
    def lose(message: Any) -> None:
        shutil.rmtree(tmp_path / "state-1")

    wide = tuple(
        s.replace("hidden_size: 8", "hidden_size: 32") for s in VIT
    )  # factors are smaller than the change
    settings = tuple(s for s in SMALL if not s.startswith("model=")) + wide
    words = ("strategy=fedex", "rounds=4", "clients_per_round=3", "engine.lost_state=restart")
    run, _ = deploy(tmp_path, *settings, *words, spoil=Spoiler(lose, (2, 1)))
    assert [r.get("out_of_sync") for r in run.rows] == [None, [1], None, None]
