"""Views of tables and of texts: noise, numbers left out or taken from other samples, tokens hidden or left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.data.views.base import TensorView, normals, uniforms
from fedsim.errors import ConfigError


class _FeatureView(TensorView):
    """A view of numbers (B, ...), each by itself."""

    wants = "floats (B, ...)"

    def suits(self, x: Tensor) -> bool:
        """Floats of any shape."""
        return x.is_floating_point() and x.dim() > 0


@dataclass(frozen=True)
class Noise(_FeatureView):
    """Gaussian noise of standard deviation ``sigma`` on every number."""

    sigma: float = 0.1

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws one number for each number."""
        return x + self.sigma * normals(x.shape, generator, x)


@dataclass(frozen=True)
class MaskedFeatures(_FeatureView):
    """Every number is replaced by ``value`` with probability ``p``."""

    p: float = 0.2
    value: float = 0.0

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws one uniform for each number."""
        return torch.where(_hit(x, self.p, generator), self.value, x)


@dataclass(frozen=True)
class SwappedFeatures(_FeatureView):
    """Every number is replaced with probability ``p`` by the one in its place in a sample of the batch, drawn evenly.

    Yoon et al. 2020, "VIME", equation 3; Bahri et al. 2022, "SCARF". What a sample becomes depends on the batch.
    """

    p: float = 0.2

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws two uniforms for each number: whether, and from whom."""
        hit = _hit(x, self.p, generator)
        whose = (uniforms(len(x), x[:1].numel(), generator, x.device) * len(x)).long().view(x.shape)
        return torch.where(hit, x.gather(0, whose), x)


@dataclass(frozen=True)
class Tokens(TensorView):
    """Tokens (B, T) hidden or left out: each becomes ``mask_id`` with probability ``mask``, or is left out with
    probability ``delete``, whereupon those behind it move up and ``pad_id`` fills the end.

    ``mask_id`` may be missing where nothing is hidden. Of a tree it shows the entry ``key``; an ``attention_mask``
    beside it says what is padding (else ``pad_id`` does), and moves up with the tokens as every other entry of the same
    shape does. Padding is neither hidden nor left out, and one token at least stays. Targets (B, T) do not move, so
    for a language model's use ``mask`` alone.
    """

    mask: float = 0.15
    delete: float = 0.0
    mask_id: int | None = None
    pad_id: int = 0
    key: str = "input_ids"
    wants = "tokens (B, T) of whole numbers"

    def __post_init__(self) -> None:
        if self.mask and self.mask_id is None:
            raise ConfigError(
                "view: Tokens hides tokens by mask_id, which is missing; give mask_id, or mask=0"
            )

    def suits(self, x: Tensor) -> bool:
        """Whole numbers (B, T)."""
        return x.dtype in (torch.int64, torch.int32) and x.dim() == 2

    def __call__(self, x: Any, generator: torch.Generator) -> Any:
        """Tokens, or a mapping that holds them under ``key``."""
        if not isinstance(x, Mapping):
            return super().__call__(x, generator)
        if not isinstance(x.get(self.key), Tensor):
            raise ConfigError(
                f"view: Tokens looks for '{self.key}' in samples that hold {', '.join(map(str, x))}; give key=NAME"
            )
        tokens = x[self.key]
        self.check(tokens)
        known = x.get("attention_mask")
        shown, order = self._shown(tokens, None if known is None else known != 0, generator)
        if order is None:
            return {**x, self.key: shown}
        index, kept = order
        same = {
            k: torch.where(kept, v.gather(1, index), 0)
            for k, v in x.items()
            if isinstance(v, Tensor) and v.shape == tokens.shape and k != self.key
        }
        return {**x, **same, self.key: shown}

    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws two uniforms a token: hidden or not, left out or not."""
        return self._shown(x, None, generator)[0]

    def _shown(
        self, x: Tensor, real: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The tokens; if some were left out, also from where each place (B, T) has its own, and which have any."""
        u = uniforms(len(x), 2 * x.shape[1], generator, x.device)
        hidden, gone = u[:, : x.shape[1]] < self.mask, u[:, x.shape[1] :] < self.delete
        real = x != self.pad_id if real is None else real
        out = torch.where(hidden & real, self.mask_id, x) if self.mask_id is not None else x
        if not self.delete:
            return out.to(x.dtype), None
        gone &= real
        everything = (gone == real).all(1)  # the token that was nearest to staying stays
        last = torch.where(real, u[:, x.shape[1] :], -1).argmax(1, keepdim=True)
        gone.scatter_(1, last, gone.gather(1, last) & ~everything.unsqueeze(1))
        index = gone.to(torch.uint8).argsort(dim=1, stable=True)
        kept = torch.arange(x.shape[1], device=x.device) < (~gone).sum(1, keepdim=True)
        return torch.where(kept, out.gather(1, index), self.pad_id).to(x.dtype), (index, kept)


def _hit(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Which numbers of ``x`` (B, ...) are drawn, each with probability ``p``."""
    return uniforms(len(x), x[:1].numel(), generator, x.device).view(x.shape) < p
