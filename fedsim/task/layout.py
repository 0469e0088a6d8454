"""Where each tensor of a model lies in its flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError

NORM_TYPES = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
BATCH_NORM = nn.modules.batchnorm._NormBase


@dataclass(frozen=True)
class Slot:
    """One tensor inside a flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int

    @property
    def span(self) -> slice:
        """Where the tensor lies in the vector."""
        return slice(self.offset, self.offset + self.numel)


class Layout:
    """Names, shapes and offsets of a model's flat vectors.

    ``params`` lists the trainable parameters in ``named_parameters()`` order (total ``dim``), ``buffers`` the
    floating-point buffers that are part of the state dict (total ``buffer_dim``). ``norm`` and ``head`` name the
    parameters of normalisation layers and of ``model.head``.
    """

    def __init__(self, model: nn.Module):
        saved = model.state_dict(keep_vars=True)
        self.params = _slots((n, p) for n, p in model.named_parameters() if p.requires_grad)
        self.buffers = _slots(
            (n, b) for n, b in model.named_buffers() if b is not None and b.is_floating_point() and n in saved
        )
        self.dim = sum(s.numel for s in self.params)
        self.buffer_dim = sum(s.numel for s in self.buffers)
        self.norm = _names_under(model, lambda m: isinstance(m, NORM_TYPES))
        self.batch_norm = _names_under(model, lambda m: isinstance(m, BATCH_NORM))
        head = getattr(model, "head", None)
        self.head = _names_under(model, lambda m: m is head) if isinstance(head, nn.Module) else frozenset()
        if not self.params:
            raise ConfigError(
                "model: it has no trainable parameter; expected at least one with requires_grad=True"
            )

    def spans(self, names: Iterable[str]) -> list[slice]:
        """Slices of the parameters called ``names``, in layout order, neighbours joined."""
        wanted, out = set(names), list[slice]()
        for slot in self.params:
            if slot.name in wanted:
                if out and out[-1].stop == slot.offset:
                    out[-1] = slice(out[-1].start, slot.span.stop)
                else:
                    out.append(slot.span)
        return out

    def named(self, w: Tensor) -> dict[str, Tensor]:
        """Views of ``w`` (..., d) by parameter name, shape (..., *parameter shape)."""
        return {s.name: w[..., s.span].view(*w.shape[:-1], *s.shape) for s in self.params}

    def named_buffers(self, b: Tensor) -> dict[str, Tensor]:
        """Views of ``b`` (..., b) by buffer name."""
        return {s.name: b[..., s.span].view(*b.shape[:-1], *s.shape) for s in self.buffers}

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Parameters by name to one vector (d,); a missing or misshapen name is a ``ConfigError``."""
        return _flatten(self.params, tensors, dtype, "parameter")

    def flatten_buffers(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Buffers by name to one vector (b,)."""
        return _flatten(self.buffers, tensors, dtype, "buffer")


def _slots(tensors: Iterable[tuple[str, Tensor]]) -> list[Slot]:
    out, offset = list[Slot](), 0
    for name, t in tensors:
        out.append(Slot(name, tuple(t.shape), offset, t.numel()))
        offset += t.numel()
    return out


def _names_under(model: nn.Module, is_root: Callable[[nn.Module], bool]) -> frozenset[str]:
    roots = [name for name, m in model.named_modules() if is_root(m)]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return frozenset(n for n in names for r in roots if r == "" or n.startswith(r + "."))


def _flatten(slots: Sequence[Slot], tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> Tensor:
    parts = []
    for slot in slots:
        if slot.name not in tensors:
            raise ConfigError(f"{what} '{slot.name}' is missing; given: {', '.join(tensors) or 'nothing'}")
        t = torch.as_tensor(tensors[slot.name])
        if tuple(t.shape) != slot.shape:
            raise ConfigError(f"{what} '{slot.name}' has shape {tuple(t.shape)}, expected {slot.shape}")
        parts.append(t.detach().reshape(-1).to(dtype))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype)
