"""The part of a model that a run does not change: its identity, and a whole state dict made of it and of what changed.

It consists of the frozen parameters, and of the saved buffers that stay as they are (``fedsim.task.fixed.still``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedsim.errors import ConfigError, hint
from fedsim.task.fixed import still
from fedsim.task.mapped import Memory, place_of

DOMINANT = 0.75  # share of a model's numbers from which its frozen part is a base that results refer to
_known: WeakKeyDictionary[Memory, dict[int, str]] = WeakKeyDictionary()  # sha256 of what lies there, by start


HELD = "_fedsim_held"  # of a model: what is frozen and no part of its base
_no_base: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class FrozenBase:
    """What results and messages say of a frozen part: a ``name`` without a path, and the ``sha256`` of its names,
    types, shapes and bytes."""

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"'{self.name}' (sha256 {self.sha256[:12]})"

    def metadata(self) -> dict[str, str]:
        """As it stands in the head of a safetensors file."""
        return {"base": self.name, "base_sha256": self.sha256}


def frozen_part(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, by their names in the state dict: tied ones under each of theirs."""
    fixed = still(model)
    return {
        name: t
        for name, t in model.state_dict(keep_vars=True).items()
        if isinstance(t, Tensor) and (not t.requires_grad if isinstance(t, nn.Parameter) else id(t) in fixed)
    }


def base_of(model: nn.Module) -> FrozenBase | None:
    """The frozen part of ``model``; ``None`` if no parameter is frozen. Hashing takes about a second a gigabyte; what
    lies in shared memory is hashed once."""
    if all(p.requires_grad for p in model.parameters()):
        return None
    whole, seen = hashlib.sha256(), dict[int, str]()
    held: frozenset[str] = getattr(model, HELD, frozenset())
    for name, t in frozen_part(model).items():
        if name in held:
            continue
        if id(t) not in seen:
            seen[id(t)] = _digest(t)
        whole.update(json.dumps([name, str(t.dtype), list(t.shape), seen[id(t)]]).encode())
    return FrozenBase(_name(model), whole.hexdigest())


def dominant(model: nn.Module) -> bool:
    """Whether most of the model's numbers are frozen, each tensor counted once."""
    frozen = {id(t) for t in frozen_part(model).values()}
    saved = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(saved[i].numel() for i in frozen) > DOMINANT * sum(t.numel() for t in saved.values())


def left_out(model: nn.Module) -> tuple[frozenset[str], dict[str, str] | None]:
    """Names of the state dict that files of the model's weights leave out, and what their head says instead: the
    frozen part, where that is dominant and there is a model that has it (``is_no_base``); else nothing. What only the
    method leaves frozen is held all the same (``frozen_by_method``)."""
    if model in _no_base or not dominant(model) or (base := base_of(model)) is None:
        return frozenset(), None
    return frozenset(frozen_part(model)) - getattr(model, HELD, frozenset()), base.metadata()


def is_no_base(model: nn.Module) -> None:
    """Its frozen part is not that of the model that was configured or handed over, so results must hold it."""
    _no_base.add(model)


def frozen_by_method(model: nn.Module, names: frozenset[str]) -> None:
    """The parameters ``names`` of ``model``, which are frozen by now, are trained by other methods: files hold them."""
    setattr(model, HELD, names)


def reference(path: Path) -> FrozenBase | None:
    """The base that a file of weights refers to; ``None`` where it holds all there is."""
    with safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
    return FrozenBase(said["base"], said["base_sha256"]) if "base_sha256" in said else None


def full_state(
    model: nn.Module, weights: Mapping[str, Tensor], base: FrozenBase | None = None
) -> dict[str, Tensor]:
    """A whole state dict for ``model``: ``weights`` as a run gives them, and what they lack of ``model``'s frozen part.

    Tensors are not copied. ``base``: what the weights refer to (``reference``), compared with ``model``'s.

    Raises:
        ConfigError: if names are unknown or missing, or the model's frozen part is another one than ``base``.
    """
    saved = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    frozen = frozen_part(model)
    for name in weights:
        if name not in saved:
            raise ConfigError(f"weights: the model has no '{name}'{hint(name, saved)}")
    for name in saved:
        if name not in weights and name not in frozen:
            raise ConfigError(f"weights: '{name}' is missing; given: {', '.join(weights) or 'nothing'}")
    if base is not None and (mine := base_of(model)) != base and (mine is None or mine.sha256 != base.sha256):
        raise ConfigError(
            f"weights: they were trained on the base {base}, but the model's is {mine or 'trained as a whole'}; build "
            "the model on the base that they name"
        )
    return {name: weights.get(name, t) for name, t in saved.items()}


def _digest(t: Tensor) -> str:
    place = place_of(t)
    if place is None:
        return _sha256(t)
    known = _known.setdefault(place.memory, {})
    if place.start not in known:
        known[place.start] = _sha256(t)
    return known[place.start]


def _sha256(t: Tensor) -> str:
    flat = t.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if len(flat) else b"").hexdigest()


def _name(model: nn.Module) -> str:
    """The name that the model's configuration bears, without a folder of this machine; else its class's."""
    for m in model.modules():
        name = getattr(getattr(m, "config", None), "name_or_path", None)
        if isinstance(name, str) and name.strip("/"):
            return published(name)
    bare: list[Any] = [m for m in model.modules() if callable(getattr(m, "get_base_model", None))]
    return type(bare[0].get_base_model() if bare else model).__name__


def published(name: str) -> str:
    """A name of a hub ("owner/model") as it is; of a folder its last part."""
    path = Path(name)
    hub = len(path.parts) <= 2 and not path.is_absolute() and not name.startswith((".", "~"))
    return name if hub and not path.exists() else path.resolve().name
