"""Where each tensor of a model lies in its flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.models.split import head_of
from fedsim.task import slots
from fedsim.task.fixed import BATCH_NORM, averaged
from fedsim.task.slots import Slot, Slots

__all__ = ["Layout", "Slot", "Slots"]

TRAVEL = "_fedsim_travel"  # of a model: kinds of vectors by the names that alone are not zero in them
NORM_TYPES = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


class Layout:
    """Names, shapes and offsets of a model's flat vectors.

    ``params`` lists the trainable parameters in ``named_parameters()`` order, ``buffers`` the floating-point buffers
    that are part of the state dict, without those that stay fixed (``fedsim.task.fixed``). ``dim`` and ``buffer_dim``
    are the lengths of the vectors, ``size`` and ``buffer_size`` how many numbers of the model they hold: the rest is
    padding (see ``fedsim.task.slots``). ``vectors`` are the kinds that travel without zeros that say nothing: padding,
    and what stays with its client or is not trained in a round (``only_travel``). ``norm`` and ``head`` name the
    parameters of normalisation layers and of the head (``fedsim.models.split.head_of``).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None, *, aligned: bool = True):
        """``dtype`` of the vectors, which says how many entries 64 bytes hold: by default the first parameter's.

        ``aligned=False``: no padding, for networks beside the model, whose vectors nobody else knows the layout of.
        """
        params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not params:
            raise ConfigError(
                "model: it has no trainable parameter; expected at least one with requires_grad=True"
            )
        step = max(1, slots.ALIGNMENT // (dtype or params[0][1].dtype).itemsize) if aligned else 1
        self.params, self.buffers = Slots(params, step, "parameter"), Slots(averaged(model), step, "buffer")
        self.vectors = {"w": self.params, "b": self.buffers}  # by kind
        for kind, names in getattr(model, TRAVEL, {}).items():
            self.vectors = {kind: self.params.part(names), **self.vectors}
        self.padded: dict[int, list[tuple[str, Slots]]] = {}  # those with padding to leave out, by length
        for kind, held in self.vectors.items():
            if held.padded:
                self.padded.setdefault(held.dim, []).append((kind, held))
        self.plain = len(self.vectors) == 2  # no part of the parameters travels alone
        self.dim, self.size = self.params.dim, self.params.size
        self.buffer_dim, self.buffer_size = self.buffers.dim, self.buffers.size
        self.norm = _names_under(model, lambda m: isinstance(m, NORM_TYPES))
        self.batch_norm = _names_under(model, lambda m: isinstance(m, BATCH_NORM))
        head = head_of(model)
        self.head = _names_under(model, lambda m: m is head) if isinstance(head, nn.Module) else frozenset()

    def spans(self, names: Iterable[str]) -> list[slice]:
        """Slices of the parameters called ``names``, in layout order, neighbours joined with the padding between."""
        wanted, out, last = set(names), list[slice](), -1
        for i, slot in enumerate(self.params):
            if slot.name in wanted:
                if out and last == i - 1:
                    out[-1] = slice(out[-1].start, slot.span.stop)
                else:
                    out.append(slot.span)
                last = i
        return out

    def named(self, w: Tensor) -> dict[str, Tensor]:
        """Views of ``w`` (..., d) by parameter name, shape (..., *parameter shape)."""
        return self.params.named(w)

    def named_buffers(self, b: Tensor) -> dict[str, Tensor]:
        """Views of ``b`` (..., b) by buffer name."""
        return self.buffers.named(b)

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Parameters by name to one vector (d,); a missing or misshapen name is a ``ConfigError``."""
        return self.params.flatten(tensors, dtype)

    def compact(self, w: Tensor) -> Tensor:
        """``w`` (..., d) without its padding, (..., size)."""
        return self.params.compact(w)

    def expand(self, v: Tensor) -> Tensor:
        """``v`` (..., size) as a flat vector (..., d), with zeros as padding."""
        return self.params.expand(v)


def only_travel(model: nn.Module, parts: Iterable[Collection[str]]) -> None:
    """Let vectors of ``model`` that are zero but for the parameters of one of ``parts`` travel as these alone."""
    setattr(model, TRAVEL, {chr(ord("A") + i): frozenset(names) for i, names in enumerate(parts)})


def _names_under(model: nn.Module, is_root: Callable[[nn.Module], bool]) -> frozenset[str]:
    roots = [name for name, m in model.named_modules() if is_root(m)]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return frozenset(n for n in names for r in roots if r == "" or n.startswith(r + "."))
