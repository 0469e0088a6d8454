"""Low-rank adapters (LoRA, Hu et al. 2022) as parts of a model's vectors: layer by layer A, B, the scale and the base.

An adapted layer computes with ``W + s B A``, W (out, in) frozen, A (r, in), B (out, r). Methods that change the base
keep what they add to W beside it, in a buffer of the layer (``change``): it is part of the model's vector of buffers,
so it travels, is hashed, checkpointed and written with the model, and the base stays as it was loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.task.layout import Layout
from fedsim.task.slots import Slot

NO_ADAPTERS = (
    "(outside adapters)"  # in the place of a pattern of names: all that is trained outside low-rank adapters
)
MORE = ("lora_magnitude_vector", "lora_variant")  # of peft's layers that compute with more than W + s B A
CHANGE = "base_change"  # name of the buffer beside a base's weight, of the same shape and orientation


@dataclass(frozen=True)
class Adapter:
    """One adapted layer: where A (r, in) and B (out, r) lie in ``w``, the scale s, and of a base that changes where
    the change lies in ``buffers``: (out, in), or (in, out) where the layer keeps its weight ``transposed``."""

    name: str
    a: Slot
    b: Slot
    scale: float
    transposed: bool = False
    change: Slot | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def width(self) -> int:
        """in + out: numbers that travel for each rank."""
        return self.a.shape[1] + self.b.shape[0]

    @property
    def dense(self) -> int:
        """in * out: numbers of the base's weight."""
        return self.a.shape[1] * self.b.shape[0]

    def factors(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Views of ``w`` (..., d): A (..., r, in) and B (..., out, r)."""
        a, b = (w[..., s.span].view((*w.shape[:-1], *s.shape)) for s in (self.a, self.b))
        return a, b

    def change_of(self, buffers: Tensor) -> Tensor:
        """View (out, in) of ``buffers`` (b,): what has been added to the base."""
        if self.change is None:
            raise ConfigError(f"model: the base of '{self.name}' has no place for a change of it")
        view = buffers[self.change.span].view(self.change.shape)
        return view.T if self.transposed else view


def outside_adapters(names: Sequence[str]) -> list[str]:
    """Those of ``names`` of trained parameters that are no adapter's; none, if there is no adapter among them."""
    others = [n for n in names if "lora_" not in n]
    return others if len(others) < len(names) else []


# -- views --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted layer of a module: names of its factors, scale, the layer that holds the base's weight; ``key``, the
    adapter's name where there may be several."""

    name: str
    key: str
    a: str
    b: str
    scale: float
    base: nn.Module
    base_name: str

    @property
    def transposed(self) -> bool:
        """Whether the base keeps its weight as (in, out).

        Raises:
            ConfigError: for a layer of which that is not known.
        """
        return _transposed(self)


def adapters_of(model: nn.Module, layout: Layout) -> tuple[Adapter, ...]:
    """The adapters of ``model`` that are trained, in the order of its modules.

    A layer counts that has ``lora_A`` and ``lora_B``, or ``lora_embedding_A`` and ``lora_embedding_B`` (layers,
    parameters, or one of them for each adapter's name, as in peft) and ``scaling``. They are told apart by name, never
    by shape.
    """
    params, buffers = ({s.name: s for s in slots} for slots in (layout.params, layout.buffers))
    out = []
    for f in layers_of(model):
        if f.a in params and f.b in params:
            change = buffers.get(f"{f.base_name}.{CHANGE}".lstrip("."))
            turned = change is not None and _transposed(f)
            out.append(Adapter(f.name, params[f.a], params[f.b], f.scale, turned, change))
    return tuple(out)


def changeable(model: nn.Module) -> nn.Module:
    """Give every base of a trained adapter of ``model``, in place, a place for its change, zero at first.

    Raises:
        ConfigError: without adapters, or if a product that is added to a layer's weight would not do the same there.
    """
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    found = [f for f in layers_of(model) if f.a in trained and f.b in trained]
    if not found:
        raise ConfigError(
            "model: there is no adapter of which both factors are trained; type model=hf model.lora={r: 4}"
        )
    if any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules()):
        raise ConfigError(
            "model: it has BatchNorm, whose statistics clients would send beside the change of the base; "
            "type strategy=fedit, or a model without it"
        )
    for f in found:
        layer = model.get_submodule(f.name)
        if any(len(getattr(layer, k, ())) for k in MORE):
            raise ConfigError(
                f"model.lora: '{f.name}' computes with more than W + s B A (use_dora and the like); leave that out, or "
                "type strategy=fedit"
            )
        transposed, base = _transposed(f), f.base
        if CHANGE not in base._buffers:
            weight: Any = base.weight
            base.register_buffer(CHANGE, torch.zeros(weight.shape, dtype=torch.float32))
            base.register_forward_hook(_Changed(transposed))
    return model


class _Changed:
    """Adds what the change of the base makes of the input; a class, so that it can be pickled."""

    def __init__(self, transposed: bool):
        self.transposed = transposed

    def __call__(self, layer: Any, given: tuple[Any, ...], output: Tensor) -> Tensor:
        change: Tensor = layer.base_change
        more = F.linear(given[0].to(change.dtype), change.T if self.transposed else change)
        return output + more.to(output.dtype)


def layers_of(model: nn.Module) -> Iterator[AdaptedLayer]:
    """All adapted layers of ``model``, trained or not."""
    for name, m in model.named_modules():
        inner = next(
            (k for k in ("base_layer", "base", "linear") if isinstance(getattr(m, k, None), nn.Module)), ""
        )
        base = getattr(m, inner) if inner else m
        base_name = f"{name}.{inner}".strip(".")
        prefix = f"{name}." if name else ""
        for kind in ("lora_", "lora_embedding_"):
            a, b = getattr(m, f"{kind}A", None), getattr(m, f"{kind}B", None)
            for key in [] if a is None or b is None else _keys(a):
                scaling: Any = getattr(m, "scaling", None)
                if isinstance(scaling, dict):
                    scaling = scaling[key]
                if not isinstance(scaling, int | float):
                    raise ConfigError(f"model: '{name}' has lora_A and lora_B but no number called scaling")
                names = [f"{prefix}{kind}{part}{_suffix(of, key)}" for part, of in (("A", a), ("B", b))]
                yield AdaptedLayer(name, key, names[0], names[1], float(scaling), base, base_name)


def _keys(factor: Any) -> list[str]:
    return list(factor) if isinstance(factor, nn.ModuleDict | nn.ParameterDict) else [""]


def _suffix(factor: Any, key: str) -> str:
    """How a factor's weight is named behind ``lora_A``."""
    own = factor[key] if key else factor
    return (f".{key}" if key else "") + (".weight" if isinstance(own, nn.Module) else "")


def _transposed(f: AdaptedLayer) -> bool:
    """Whether the base keeps its weight as (in, out).

    Raises:
        ConfigError: for a layer of which that is not known.
    """
    kind = type(f.base).__name__
    if isinstance(f.base, nn.Linear):
        return False
    if kind == "Conv1D":  # of transformers
        return True
    raise ConfigError(
        f"model: the base of '{f.name}' is a {kind}, and a change is added to weights of nn.Linear and Conv1D only; "
        "name others in model.lora.target_modules, or type strategy=fedit"
    )


# -- products -----------------------------------------------------------------------------------------------------


def exact_mean(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """``sum_i p_i B_i A_i`` (out, in) of a (M, r, in), b (M, out, r), p (M,); never one product by itself."""
    left = (b * p[:, None, None]).transpose(0, 1).flatten(1)  # (out, M r)
    return left @ a.flatten(0, 1)


def cross_term(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """``sum_i p_i B_i A_i - mean(B) mean(A)`` (out, in), with p summing to 1: as the sum of p_i (B_i - mean(B))
    (A_i - mean(A)), which loses no digits where clients have hardly moved apart."""
    mean_a, mean_b = (torch.tensordot(p, t, 1) for t in (a, b))
    return exact_mean(a - mean_a, b - mean_b, p)


def stacked(
    a: Sequence[Tensor], b: Sequence[Tensor], p: Sequence[float], scales: Sequence[float], scale: float
) -> tuple[Tensor, Tensor]:
    """Factors A (sum r_i, in) and B (out, sum r_i) with ``scale B A = sum_i p_i s_i B_i A_i`` of clients with any
    ranks r_i; weights and scales enter once, in A."""
    weighed = [t * (q * s / scale) for t, q, s in zip(a, p, scales, strict=True)]
    return torch.cat(weighed, dim=-2), torch.cat(list(b), dim=-1)


def product_norm(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Frobenius norms (M,) of ``scale B_i A_i``, by (r, r) matrices alone."""
    squares = ((b.transpose(-1, -2) @ b) * (a @ a.transpose(-1, -2)).transpose(-1, -2)).sum((-1, -2))
    return scale * squares.clamp(min=0).sqrt()


def truncated(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors A (rank, in), B (out, rank) of ``change`` (out, in), by its singular values, and what is lost:
    ``|B A - change| / |change|``."""
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * v[:rank]
    whole = float(s.square().sum().sqrt())
    lost = float(s[rank:].square().sum().sqrt()) / whole if whole else 0.0
    return a.to(change.dtype), b.to(change.dtype), lost
