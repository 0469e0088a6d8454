"""Embedding a data set once with a frozen encoder; kept on disk under the hash of what went in."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fedsim.config.parts import part
from fedsim.config.schema import EmbedConfig
from fedsim.data.cache import cached
from fedsim.data.dataset import Dataset, Samples, SamplesLike
from fedsim.data.local import prepare
from fedsim.errors import ConfigError
from fedsim.rng import hash_tensors

FORMAT = "1"  # raise when embeddings of the same encoder and samples change


def embedded(data: Dataset, node: DictConfig, options: EmbedConfig, device: str) -> Dataset:
    """``data`` with embeddings (N, d) float32 for samples, made in batches in evaluation mode without gradients.

    Runs of a sweep, and later ones, find them in the cache by encoder (configuration and weights), samples and options.

    Raises:
        ConfigError: if the encoder cannot be built, does not give (B, d), or samples are augmented.
    """
    if data.augment is not None:
        raise ConfigError("data.augment: embeddings are made once, before training; type data.augment=false")
    encoder = part(node, "encoder", input_shape=data.input_shape)
    if not isinstance(encoder, nn.Module):
        raise ConfigError(
            f"encoder: {node.get('_target_')} gave {type(encoder).__name__}, expected an nn.Module"
        )
    encoder.eval()
    held = list(encoder.state_dict().values())
    named = OmegaConf.to_yaml(node, resolve=True, sort_keys=True)
    scale = None if getattr(encoder, "raw", False) else data.normalize
    key = (FORMAT, named, hash_tensors(held), str(scale), str(options.normalize), device.partition(":")[0])

    def samples(given: SamplesLike) -> Samples:
        if not isinstance(given, Samples) or not isinstance(given.x, Tensor):
            raise ConfigError(
                "encoder: embeddings are made of one tensor per sample, in memory; leave encoder out"
            )
        content = hashlib.sha256(f"{given.x.dtype}{tuple(given.x.shape)}".encode())
        content.update(hash_tensors([given.x]).encode())

        raw = given.x

        def build() -> dict[str, np.ndarray]:
            return {"x": _run(encoder, raw, scale, options, device)}

        x = cached("embeddings", (*key, content.hexdigest()), build)["x"]
        return Samples(torch.from_numpy(x), given.y)

    test = None if data.test is None else samples(data.test)
    return replace(data, train=samples(data.train), test=test, normalize=None)


def _run(encoder: nn.Module, x: Tensor, scale: Any, options: EmbedConfig, device: str) -> np.ndarray:
    encoder = encoder.to(device)
    out: list[Tensor] = []
    with torch.inference_mode():
        for batch in torch.split(x, options.batch_size):
            raw = batch.to(device)
            z = encoder(raw if getattr(encoder, "raw", False) else prepare(raw, torch.float32, scale))
            if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != len(batch):
                given = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ConfigError(f"encoder: gave {given} for {len(batch)} samples, expected (B, d)")
            out.append((nn.functional.normalize(z, dim=1) if options.normalize else z).float().cpu())
    joined = torch.cat(out).numpy()
    bad = np.flatnonzero(~np.isfinite(joined).all(axis=1))
    if len(bad):
        raise ConfigError(f"encoder: the embedding of sample {bad[0]} is not finite ({len(bad)} samples)")
    return joined
