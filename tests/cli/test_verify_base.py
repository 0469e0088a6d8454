"""``fedsim verify`` of a run whose model was built on weights in a folder: there, gone, and others."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedsim
from fedsim.cli.main import command

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.slow
def test_a_lost_base_is_named_and_so_is_another_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.ViTConfig(num_channels=1, image_size=8, patch_size=4, num_labels=10, **SIZES)
    place = tmp_path / "body"
    transformers.ViTForImageClassification(config).save_pretrained(place)
    model = ("model=hf", f"model.path={place}", "model.lora={r: 2, target_modules: [q_proj, v_proj]}")
    words = ("engine=serial", "tracker=quiet", "rounds=1", "num_clients=4", "clients_per_round=2")
    run = str(fedsim.simulate([*words, *model, f"dir={tmp_path / 'run'}"]).dir)
    assert command(["verify", run]) == 0
    place.rename(tmp_path / "away")
    assert command(["verify", run]) == 2
    said = capsys.readouterr().err
    assert "the base 'body' (sha256" in said and f"model.path={place}, which is gone" in said
    transformers.ViTForImageClassification(config).save_pretrained(place)
    assert command(["verify", run]) == 1
    assert "its base was 'body' (sha256" in capsys.readouterr().out
