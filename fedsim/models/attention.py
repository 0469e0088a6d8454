"""Transformers from plain torch: a language model like GPT-2 and a vision transformer, both with norms first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.models.base import Model
from fedsim.models.layers import image_shape


class AttentionBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))`` with GELU and four times the width, on (B, T, width).

    ``causal``: a position looks at itself and those before it, and GELU is GPT-2's, by tanh. ``dropout`` falls on
    attention weights and on what is added.
    """

    def __init__(self, width: int, heads: int, *, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop, self.gelu = dropped(dropout), "tanh" if causal else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        p = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        x = x + self.drop(self.out(found.transpose(-3, -2).flatten(-2)))
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)), approximate=self.gelu)))
        return out


class GPT(Model):
    """A decoder like GPT-2 (Radford et al. 2019): codes (B, T) int64 to logits (B, T, V) of the next code.

    Weights are drawn as there: N(0, 0.02), those before a sum divided by sqrt(2 layers), biases zero.

    Args:
        input_shape: (T,), codes of a sample; shorter ones work too.
        num_classes: V, size of the vocabulary, unless ``vocabulary`` says it.
        layers: attention blocks.
        heads: of each block; they divide ``width``.
        width: of the embeddings.
        context: the longest sequence; ``None``: T.
        vocabulary: V; ``None``: ``num_classes``.
        dropout: share of entries dropped in training.
        tied: the head's weights are the embedding of the codes.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        layers: int,
        heads: int,
        width: int,
        context: int | None,
        vocabulary: int | None,
        dropout: float,
        tied: bool,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"model=gpt reads sequences of codes (T,), data gives {tuple(input_shape)}; type data=shakespeare, or "
                "model=vit for images"
            )
        if not (size := vocabulary or num_classes):
            raise ConfigError("model=gpt: the data has no classes to predict; type model.vocabulary=512")
        _check(width, heads, dropout)
        self.context = context or input_shape[0]
        self.tokens, self.places = nn.Embedding(size, width), nn.Embedding(self.context, width)
        self.drop = dropped(dropout)
        self.blocks = nn.ModuleList(
            AttentionBlock(width, heads, dropout=dropout, causal=True) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, size, bias=False)
        self.apply(_normal)
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * layers) ** 0.5)  # type: ignore[arg-type, union-attr]
        if tied:
            self.head.weight = self.tokens.weight

    def features(self, x: Tensor) -> Tensor:
        """Codes (B, T) to what the head reads (B, T, width)."""
        if x.shape[-1] > self.context:
            raise ConfigError(
                f"model.context={self.context}: a sequence of {x.shape[-1]} codes; type model.context={x.shape[-1]}"
            )
        h = self.drop(self.tokens(x.long()) + self.places.weight[: x.shape[-1]])
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.norm(h)
        return out


class ViT(Model):
    """A vision transformer (Dosovitskiy et al. 2021) without a class token: the features are the mean over patches.

    Places have learnt embeddings, for the grid of ``input_shape``; images of another size get them interpolated
    (bicubic). Weights are drawn as in ``GPT``.

    Args:
        input_shape: (C, H, W).
        num_classes: size of the output.
        patch: side of a patch in pixels; it divides H and W.
        layers: attention blocks.
        heads: of each block; they divide ``width``.
        width: of the embeddings.
        dropout: share of entries dropped in training.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        patch: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, width_px = image_shape(input_shape, "vit", smallest=1)
        _check(width, heads, dropout)
        self.patch = patch
        self._refuse_odd(height, width_px)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, width, height // patch, width_px // patch))
        self.drop = dropped(dropout)
        self.blocks = nn.ModuleList(
            AttentionBlock(width, heads, dropout=dropout, causal=False) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(_normal)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the mean over patches (B, width)."""
        self._refuse_odd(*x.shape[-2:])
        h: Tensor = self.embed(x)
        places: Tensor = self.places
        if h.shape[-2:] != places.shape[-2:]:
            places = F.interpolate(places, size=h.shape[-2:], mode="bicubic", align_corners=False)
        h = self.drop((h + places).flatten(-2).transpose(-2, -1))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.norm(h).mean(dim=-2)
        return out

    def _refuse_odd(self, height: int, width: int) -> None:
        if height % self.patch or width % self.patch:
            raise ConfigError(
                f"model.patch={self.patch} does not divide images of {height}x{width} pixels; give a patch that does"
            )


def dropped(share: float) -> nn.Module:
    """Dropout, or nothing where its share is 0: clients without it can be vectorised."""
    return nn.Dropout(share) if share else nn.Identity()


def _check(width: int, heads: int, dropout: float) -> None:
    if heads < 1 or width % heads:
        raise ConfigError(f"model.heads={heads} does not divide model.width={width}; give 1, 2, 4, ...")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout={dropout}: must be in [0, 1)")


def _normal(layer: nn.Module) -> None:
    """GPT-2's initial weights of one layer."""
    if isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d):
        nn.init.normal_(layer.weight, std=0.02)
        if (bias := getattr(layer, "bias", None)) is not None:
            nn.init.zeros_(bias)
