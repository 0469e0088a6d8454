"""Frozen encoders: modules that turn samples into embeddings (B, d) before federated training.

Any ``nn.Module`` serves as ``encoder._target_``. It receives batches as a model would, normalised; one with an
attribute ``raw = True`` receives them as they are stored (images uint8 (B, C, H, W)) and preprocesses them itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.config.allowed import check_allowed
from fedsim.errors import ConfigError
from fedsim.models.split import features_of, named_apart, with_head

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Identity(nn.Module):
    """Samples as they are stored, flattened and multiplied by ``scale``: ready-made features, or raw pixels."""

    raw = True

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (B, d) float32."""
        return x.flatten(1).float() * self.scale


class RandomFeatures(nn.Module):
    """``relu(W x + b)`` with ``width`` random directions on the flattened input; W ~ N(0, 1/n), b ~ N(0, 1)/2."""

    def __init__(self, input_shape: Sequence[int], width: int, seed: int) -> None:
        super().__init__()
        generator, n = torch.Generator().manual_seed(seed), math.prod(input_shape)
        self.register_buffer("weight", torch.randn(width, n, generator=generator) * (2 / n) ** 0.5)
        self.register_buffer("bias", torch.randn(width, generator=generator) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (B, width)."""
        return F.relu(F.linear(x.flatten(1), self.weight, self.bias))  # type: ignore[arg-type]


class RandomCNN(nn.Module):
    """Two random 3x3 convolutions with ReLU and 2x2 pooling, then the mean and maximum over a grid of positions.

    ``width`` channels at the end give ``2 * width * grid ** 2`` numbers. Nothing is learnt or fetched.
    """

    def __init__(self, input_shape: Sequence[int], width: int, grid: int, seed: int) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ConfigError(f"encoder: RandomCNN reads images (C, H, W), data gives {tuple(input_shape)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(input_shape[0], width, 3, padding=1)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (B, 2 * width * grid ** 2)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        parts = (F.adaptive_avg_pool2d(x, self.grid), F.adaptive_max_pool2d(x, self.grid))
        return torch.cat([part.flatten(1) for part in parts], dim=1)


class FromRun(nn.Module):
    """The body (``features``) of the model that a finished run of fedsim left in folder ``run``: a pretrained network.

    The run's data must have had samples of the same shape and, for the head to load, ``num_classes`` classes. Its model
    is built if it is one of fedsim's own, or of a module that ``FEDSIM_ALLOW`` names.
    """

    def __init__(self, input_shape: Sequence[int], run: str) -> None:
        super().__init__()
        from hydra.utils import instantiate
        from omegaconf import OmegaConf
        from safetensors.torch import load_file

        folder = Path(run).expanduser()
        try:
            found: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
            values = dict(found["model"])
            weights = load_file(folder / "weights.safetensors")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"encoder.run={run}: not the folder of a finished run ({error})") from error
        check_allowed(values, f"{folder / 'config.yaml'}: model")
        node, named = named_apart(OmegaConf.create(values))
        pattern = f"{named or 'head'}.weight"
        head = next((t for name, t in weights.items() if fnmatchcase(name, pattern)), None)
        if head is None or "_target_" not in node:
            raise ConfigError(
                f"encoder.run={run}: its model has no layer '{named or 'head'}', or was not named in its configuration"
            )
        model = instantiate(node, input_shape=list(input_shape), num_classes=len(head))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(f"encoder.run={run}: {str(error).splitlines()[-1].strip()}") from error
        self.model = with_head(model, named)

    def forward(self, x: Tensor) -> Tensor:
        """The model's features (B, d)."""
        return features_of(self.model, x).flatten(1)


class Clip(nn.Module):
    """The image tower of CLIP (Radford et al. 2021), from open_clip or transformers, whichever ``library`` says.

    Images are scaled to ``size`` pixels (bicubic) and normalised by CLIP's channel statistics. Weights are fetched by
    the library unless it has them; ``pretrained`` may be a file or folder.
    """

    raw = True

    def __init__(self, library: str, name: str, pretrained: str, size: int) -> None:
        super().__init__()
        self.size = size
        if library not in ("open_clip", "transformers"):
            raise ConfigError(f"encoder.library={library}: choose open_clip or transformers")
        try:
            self.tower = _open_clip(name, pretrained) if library == "open_clip" else _transformers(pretrained)
        except ImportError as error:
            package = "open_clip_torch" if library == "open_clip" else "transformers"
            raise ConfigError(f"encoder=clip needs {library}: pip install {package} ({error})") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"encoder=clip: {library} has no weights {name} {pretrained} ({error}); type encoder.pretrained=<file>"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        """Image features (B, d), not scaled to unit length."""
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise ConfigError(
                f"encoder=clip reads images (C, H, W) of 1 or 3 channels, data gives {tuple(x.shape[1:])}"
            )
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        x = x.expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        out: Tensor = self.tower((x - mean) / std)
        return out


class _Tower(nn.Module):
    """A model whose image features come from one of its methods."""

    def __init__(self, model: Any, call: str) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        out = getattr(self.model, self.call)(x)
        features: Tensor = out.image_embeds if hasattr(out, "image_embeds") else out
        return features


def _open_clip(name: str, pretrained: str) -> nn.Module:
    import open_clip

    return _Tower(open_clip.create_model(name, pretrained=pretrained), "encode_image")


def _transformers(pretrained: str) -> nn.Module:
    from transformers import CLIPVisionModelWithProjection

    return _Tower(CLIPVisionModelWithProjection.from_pretrained(pretrained), "forward")
