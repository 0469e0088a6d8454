"""The content of tensors, arrays and modules of torch, and what pickle makes of any other object."""

from __future__ import annotations

import copyreg
import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_PARTS = ("_parameters", "_buffers", "_modules")  # of a module; their order counts
_COMPILED = "_compiled_call_impl"  # the same computation, and nothing that could be compared


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a tensor of torch. Where torch is not loaded, there is none."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_shared(x: Any) -> bool:
    """Whether it counts that ``x`` is met again and not its copy, as tied weights are: a tensor or a module."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor | torch.nn.Module)


def tensor(x: Any, content: bool) -> Iterator[bytes]:
    """Type, shape, whether it is trained, and the bytes if ``content``."""
    import torch

    if torch.nn.parameter.is_lazy(x):
        yield b"lazy"
        return
    yield repr((str(x.dtype), tuple(x.shape), x.requires_grad)).encode()
    if not content or x.is_meta:
        return
    dense = x.detach().cpu()
    dense = dense.to_dense() if dense.layout != torch.strided else dense
    dense = dense.resolve_conj().resolve_neg()
    flat = (dense.dequantize() if dense.is_quantized else dense).contiguous().reshape(-1)
    yield hashlib.sha256(flat.view(torch.uint8).numpy().data if len(flat) else b"").digest()


def array(x: Any, content: bool) -> list[bytes] | None:
    """The same of an array or scalar of NumPy, and the state of a generator of torch; ``None`` for anything else."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(x, numpy.ndarray | numpy.generic) and not x.dtype.hasobject:
        values = numpy.ascontiguousarray(x)
        seen = hashlib.sha256(values.reshape(-1).view(numpy.uint8).data if values.size and content else b"")
        return [b"array", type(x).__name__.encode(), str((x.dtype, x.shape)).encode(), seen.digest()]
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Generator):
        return [b"generator", x.get_state().numpy().tobytes()]
    return None


def layers(module: Any) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """All that a module is made of, by group: parameters, buffers, layers, hooks and plain attributes."""
    own: Mapping[str, Any] = vars(module)
    if "_orig_mod" in own.get("_modules", {}):  # torch.compile's wrapper
        yield "compiled", [("module", own["_modules"]["_orig_mod"])]
        return
    for name in _PARTS:
        yield name, list(own.get(name, {}).items())
    hooks, plain = [], []
    for name, value in sorted(own.items()):
        if name in _PARTS or name == _COMPILED:
            continue
        if "_hooks" in name and isinstance(value, Mapping):  # by numbers that count up in a process
            hooks.append((name, list(value.values())))
        else:
            plain.append((name, value))
    yield "hooks", [(name, value) for name, value in hooks if value]
    yield "attributes", plain


def reduced(x: Any) -> Any:
    """What pickle makes of ``x``: a name, or a tuple (function, arguments, state, ...). Raises what it raises."""
    own = copyreg.dispatch_table.get(type(x))
    return own(x) if own is not None else x.__reduce_ex__(4)
