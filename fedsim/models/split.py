"""A model as a body and a head: by its own ``features`` and ``head``, or by the name of the submodule that is its head.

Whoever brings a model that has neither types ``model.head=classifier`` (``net.fc`` for a nested one, or a pattern that
fits one module, ``*.classifier``). Features are then what goes into that module. The model stays as it is but for a
plain attribute that holds the name: its parameters keep their names, and it is copied and pickled as before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from fnmatch import fnmatchcase
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from fedsim.errors import ConfigError, hint

NAME, FORWARD = "_fedsim_head", "_fedsim_forward"  # the plain attributes


def call(model: Callable[..., Any], x: Any, module: Callable[..., Any] | None = None) -> Any:
    """``model(x)``: a mapping is passed by keyword, a tuple by position, all else as it is.

    A tuple goes as one to a model with one argument, and a list by position to one that cannot do without several:
    torch collates tuples of samples to lists. ``module``: whose arguments count, where ``model`` stands for it.
    """
    if isinstance(x, Tensor):
        return model(x)
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) and spread(module or model, x) else model(x)


def spread(model: Callable[..., Any], x: tuple[Any, ...] | list[Any]) -> bool:
    """Whether the entries of ``x`` are arguments of ``model`` one by one."""
    forward = model.forward if isinstance(model, nn.Module) else model
    least, most = _arguments(getattr(forward, "__func__", forward), hasattr(forward, "__self__"))
    if isinstance(x, tuple):
        return most != 1 or len(x) == 1
    return least > 1 and len(x) >= least


@lru_cache(maxsize=256)
def _arguments(function: Callable[..., Any], bound: bool) -> tuple[int, float]:
    """How many arguments it needs and takes by position, without the object that it is bound to."""
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of compiled functions
        return 0, math.inf
    own = [p for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in own) - bound
    return least, math.inf if any(p.kind is p.VAR_POSITIONAL for p in known) else len(own) - bound


HALF = (torch.bfloat16, torch.float16)


def logits_of(output: Any) -> Any:
    """Logits of a model that returns them by name, or what it returns; half precision, of a frozen base or under
    autocast, as float32, since losses are differences and sums of them."""
    logits = getattr(output, "logits", output)
    return logits.float() if isinstance(logits, Tensor) and logits.dtype in HALF else logits


def with_logits(output: Any, logits: Tensor) -> Any:
    """``output`` for a loss, with other ``logits``, by name where it has them so."""
    return logits if output is logits or isinstance(output, Tensor) else SimpleNamespace(logits=logits)


def with_head(model: nn.Module, pattern: str | None) -> nn.Module:
    """``model`` with the submodule that ``pattern`` names as its head; itself where there is none. Shares all tensors.

    Raises:
        ConfigError: if no module has that name, or several fit the pattern.
    """
    if pattern is None:
        return model
    names = [name for name, _ in model.named_modules() if name]
    fit = [name for name in names if fnmatchcase(name, str(pattern))]
    outer = [name for name in fit if not any(name.startswith(f"{other}.") for other in fit)]
    if len(outer) != 1:
        found = f"fits {', '.join(outer)}; give one of them" if outer else f"is no module of {_kind(model)}"
        raise ConfigError(f"model.head={pattern}: {found}{'' if outer else hint(str(pattern), names)}")
    return _noted(model, NAME, outer[0])


def with_forward(model: nn.Module, forward: Callable[[nn.Module, Any], Any]) -> nn.Module:
    """``model`` whose features are what goes into its head when ``forward(model, x)`` runs it. Shares all tensors."""
    return _noted(model, FORWARD, forward)


def _noted(model: nn.Module, name: str, value: Any) -> nn.Module:
    out = object.__new__(type(model))  # a parametrised model refuses to be copied otherwise
    vars(out).update({**vars(model), name: value})
    return out


def _observed(model: nn.Module) -> bool:
    """Whether its features are what goes into its head, and not ``model.features(x)``."""
    return named_head(model) is not None or FORWARD in vars(model)


def named_head(model: nn.Module) -> str | None:
    """The name that ``with_head`` gave, if it did."""
    return vars(model).get(NAME)


def head_of(model: nn.Module) -> Any:
    """The head: the named submodule, else ``model.head``; ``None`` if it has none."""
    name = named_head(model)
    return getattr(model, "head", None) if name is None else model.get_submodule(name)


def splits(model: nn.Module) -> bool:
    """Whether it has a head, and shows what goes into it."""
    return named_head(model) is not None or all(
        callable(getattr(model, k, None)) for k in ("features", "head")
    )


def features_of(model: nn.Module, x: Any) -> Tensor:
    """What the head is given: ``model.features(x)``, or what goes into the named head, (B, d)."""
    if _observed(model):
        return features_and_output(model, x)[0]
    features: Tensor = call(model.features, x)  # type: ignore[arg-type]
    return features


def features_and_output(model: nn.Module, x: Any) -> tuple[Tensor, Any]:
    """Features, and what the head makes of them; with a named head, what the whole model returns."""
    if not _observed(model):
        z = features_of(model, x)
        return z, model.head(z)  # type: ignore[operator]
    with _inputs(head_of(model)) as given:
        output = vars(model).get(FORWARD, call)(model, x)
    if len(given) != 1:
        raise ConfigError(
            f"model.head={named_head(model) or 'head'}: {_kind(model)} calls it {len(given)} times in a forward pass; "
            "name the module that gives the output, called once"
        )
    return given[0], output


@contextmanager
def _inputs(head: nn.Module) -> Iterator[list[Tensor]]:
    """First arguments of all calls of ``head`` inside the ``with`` block."""
    given: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(args[0] if args else next(iter(kwargs.values())))

    handle = head.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()


def named_apart(node: DictConfig) -> tuple[DictConfig, str | None]:
    """A model's configuration without the name of its head, and that name.

    A class with an option ``head`` of its own keeps it: then it names nothing.
    """
    if "head" not in node or "head" in _options(str(node.get("_target_"))):
        return node, None
    kept, name = copy(node), node["head"]
    with open_dict(kept):
        del kept["head"]
    return kept, None if name is None else str(name)


def _options(target: str) -> set[str]:
    try:
        return set(inspect.signature(get_object(target)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):  # building it will say why
        return set()


def _kind(model: nn.Module) -> str:
    return type(model).__name__
