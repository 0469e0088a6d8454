"""Embedding a data set once: what enters training, what is kept on disk, and what encoders take."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import fedsim
from fedsim.config.schema import EmbedConfig
from fedsim.data import sources
from fedsim.data.embedding import embedded
from fedsim.errors import ConfigError
from fedsim.models import encoders

OPTIONS = EmbedConfig(batch_size=100, normalize=False)
QUICK = [
    "engine=serial",
    "tracker=quiet",
    "rounds=1",
    "num_clients=4",
    "clients_per_round=2",
    "client.epochs=1",
]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


class Counted(nn.Module):
    """Doubles its input; notes the sizes of its batches."""

    sizes: list[int] = []  # noqa: RUF012
    training_seen: list[bool] = []  # noqa: RUF012

    def __init__(self, scale: float = 2.0, shape: str = "flat"):
        super().__init__()
        self.scale, self.shape = nn.Parameter(torch.tensor(scale)), shape

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.training_seen.append(self.training)
        return self.scale * (x.flatten(1) if self.shape == "flat" else x)


class Raw(Counted):
    raw = True

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        return super().forward(x.float())


def node(name: str = "Counted", **options: Any) -> Any:
    return OmegaConf.create({"_target_": f"test_encoders.{name}", **options})


def test_every_sample_is_embedded_once_and_found_again() -> None:
    Counted.sizes.clear()
    data = sources.digits()
    first = embedded(data, node(), OPTIONS, "cpu")
    assert Counted.sizes == [100] * 3 + [64] + [100] * 14 + [33] and not any(Counted.training_seen)
    assert first.normalize is None and first.input_shape == (64,) and first.train.y is data.train.y
    torch.testing.assert_close(first.train.x, 2 * data.normalize(data.train.x, torch.float32).flatten(1))
    again = embedded(data, node(), OPTIONS, "cpu")
    assert len(Counted.sizes) == 19 and torch.equal(again.train.x, first.train.x)
    embedded(data, node(scale=3.0), OPTIONS, "cpu")  # other weights are another encoder
    assert len(Counted.sizes) == 38
    small = sources.digits(subset=100)  # other samples; the test set is the same
    embedded(small, node(), OPTIONS, "cpu")
    assert len(Counted.sizes) == 39


def test_unit_length_is_an_option_and_another_entry() -> None:
    data = sources.digits()
    made = embedded(data, node(), EmbedConfig(batch_size=512, normalize=True), "cpu")
    torch.testing.assert_close(made.train.x.norm(dim=1), torch.ones(len(made.train)))


def test_an_encoder_may_ask_for_samples_as_they_are_stored() -> None:
    data = sources.digits()
    made = embedded(data, node("Raw", scale=1.0), OPTIONS, "cpu")
    assert torch.equal(made.train.x, data.train.x.flatten(1).float())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (node(shape="image"), r"gave \(100, 1, 8, 8\) for 100 samples, expected \(B, d\)"),
        (OmegaConf.create({"_target_": "builtins.dict"}), "gave dict, expected an nn.Module"),
        (node(scale=float("inf")), "the embedding of sample 0 is not finite"),
        (node(width=3), "unknown key 'encoder.width'"),
    ],
)
def test_encoders_that_cannot_be_used(target: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        embedded(sources.digits(), target, OPTIONS, "cpu")


def test_augmented_samples_have_no_lasting_embedding() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment"):
        embedded(sources.digits(augment=True), node(), OPTIONS, "cpu")


def test_random_encoders_repeat_themselves_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    for kind, options in (
        (encoders.RandomFeatures, {"width": 32}),
        (encoders.RandomCNN, {"width": 4, "grid": 4}),
    ):
        one, two, other = (kind((1, 8, 8), seed=s, **options)(torch.ones(3, 1, 8, 8)) for s in (0, 0, 1))
        assert one.shape == (3, 32 if kind is encoders.RandomFeatures else 128)
        assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="reads images"):
        encoders.RandomCNN((5,), width=4, grid=2, seed=0)


def test_ready_made_features_pass_as_they_are() -> None:
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(encoders.Identity(scale=1.0)(x), x.float())
    pixels = embedded(
        sources.digits(),
        OmegaConf.create({"_target_": "fedsim.models.encoders.Identity", "scale": 1 / 16}),
        OPTIONS,
        "cpu",
    )
    assert float(pixels.train.x.max()) == 1


def test_a_run_with_an_encoder_trains_on_embeddings(tmp_path: Path) -> None:
    result = fedsim.simulate([*QUICK, "encoder=random_features", "encoder.width=20", "model=linear"])
    assert result.weights["head.weight"].shape == (10, 20)
    entries = list((tmp_path / "cache").glob("embeddings-*"))
    assert len(entries) == 2  # training and test samples
    fedsim.simulate([*QUICK, "encoder=random_features", "encoder.width=20", "model=linear", "seed=1"])
    assert list((tmp_path / "cache").glob("embeddings-*")) == entries


def test_the_body_of_an_earlier_run_is_an_encoder() -> None:
    run = fedsim.simulate([*QUICK, "model=mlp", "model.hidden=[12]"])
    encoder = encoders.FromRun((1, 8, 8), run=str(run.dir))
    x = torch.ones(2, 1, 8, 8)
    weight, bias = run.weights["layers.0.weight"], run.weights["layers.0.bias"]
    torch.testing.assert_close(encoder(x), torch.relu(x.flatten(1) @ weight.T + bias))
    settings = [*QUICK, "encoder=from_run", f"encoder.run={run.dir}", "model=linear"]
    assert fedsim.simulate(settings).weights["head.weight"].shape == (10, 12)
    with pytest.raises(ConfigError, match="not the folder of a finished run"):
        encoders.FromRun((1, 8, 8), run="nowhere")


def test_clip_gets_large_normalised_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in for the library, which is not installed everywhere: what the tower is shown."""
    shown: list[Tensor] = []

    class Tower(nn.Module):
        def encode_image(self, x: Tensor) -> Tensor:
            shown.append(x)
            return x.mean((2, 3))

    library = types.ModuleType("open_clip")
    library.create_model = lambda name, pretrained: Tower()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "open_clip", library)
    encoder = encoders.Clip("open_clip", "ViT-B-16", "openai", size=32)
    grey = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    out = encoder(grey)
    expected = (1 - np.array(encoders.CLIP_MEAN)) / np.array(encoders.CLIP_STD)
    assert shown[0].shape == (2, 3, 32, 32)
    np.testing.assert_allclose(out[0].numpy(), expected, rtol=1e-5)


def test_without_the_library_clip_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match="pip install open_clip_torch"):
        encoders.Clip("open_clip", "ViT-B-16", "openai", size=224)
    with pytest.raises(ConfigError, match="choose open_clip or transformers"):
        encoders.Clip("timm", "ViT-B-16", "openai", size=224)
