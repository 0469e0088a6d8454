"""The model that a run starts from, drawn under its seed or handed over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from fedsim.config.parts import part
from fedsim.config.targets import check_derived
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError, hint
from fedsim.models import split
from fedsim.rng import key
from fedsim.run.given import Given
from fedsim.server.traits import Traits
from fedsim.task.admission import admitted
from fedsim.task.copies import copied
from fedsim.task.fixed import converted
from fedsim.task.frozen import dominant, frozen_by_method, frozen_part, is_no_base
from fedsim.task.layout import only_travel
from fedsim.task.lowrank import NO_ADAPTERS, changeable, outside_adapters
from fedsim.task.mapped import share
from fedsim.task.vectors import FlatModel, Weights

DTYPES = {"float32": torch.float32, "float64": torch.float64}
MODEL = "model; type model=NAME, or name a class that is derived from torch.nn.Module"


def model(
    config: DictConfig,
    data: Dataset,
    given: nn.Module | Callable[[], nn.Module] | None,
    *draw: int,
) -> nn.Module:
    """The initial model; a configured or given factory runs under a generator keyed by the seed and ``draw``.

    Its head is the submodule that ``model.head`` names, if it does (``fedsim.models.split``).

    Raises:
        ConfigError: for one that cannot be trained (``fedsim.task.admission``).
    """
    shape = {} if isinstance(given, nn.Module) else shape_of(data, config)
    return built(config, shape, given, *draw)


def shape_of(data: Dataset, config: DictConfig) -> dict[str, Any]:
    """What a configured model's factory is told of the data: ``num_classes`` are the outputs, also where targets are
    numbers."""
    return {"input_shape": data.input_shape, "num_classes": data.num_classes or _numbers(data, config)}


def _numbers(data: Dataset, config: DictConfig) -> int:
    """How many numbers a sample has to be predicted, and of one how many quantiles; 0 for other targets."""
    y: Any = getattr(data.train, "y", None)
    if not isinstance(y, torch.Tensor) or not y.is_floating_point() or y.dim() > 2:
        return 0
    columns, task = 1 if y.dim() == 1 else y.shape[1], config.get("task") or {}
    return len(task["quantiles"]) if columns == 1 and task.get("loss") == "quantile" else columns


def built(
    config: DictConfig,
    shape: Mapping[str, Any],
    given: nn.Module | Callable[[], nn.Module] | None,
    *draw: int,
) -> nn.Module:
    """The same of data of which a configured factory is told ``shape`` (see ``shape_of``)."""
    dtype = DTYPES.get(config.dtype, torch.float32)
    named = None if given is None else config.model.get("head")
    if isinstance(given, nn.Module):
        return split.with_head(admitted(given, dtype), named)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "model", *draw) >> 1)
        if given is not None:
            return split.with_head(admitted(_module(_called(given), "what was handed over"), dtype), named)
        node, named = split.named_apart(config.model)
        check_derived("model", node, "state_dict", MODEL)
        made = part(node, "model", **shape)
    return split.with_head(admitted(_module(made, node.get("_target_")), dtype), named)


def _called(factory: Callable[[], nn.Module]) -> Any:
    """What a factory that was handed over gives, if it can be called without arguments."""
    name = getattr(factory, "__name__", type(factory).__name__)
    if not callable(factory):
        raise ConfigError(
            f"model: got {name}, expected an nn.Module, or a function without arguments that makes one"
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ConfigError(
            f"model: {name} cannot be called without arguments ({error}); hand over a module, {name}(...), or "
            f"lambda: {name}(...)"
        ) from error
    except ValueError:  # no signature to be had
        pass
    return factory()


def trainable(config: DictConfig, given: Given) -> Given:
    """What was handed over, with a model that can be copied and trained; a factory's is looked at when it is built."""
    if given.initial is not None and not isinstance(given.initial, Mapping):
        kind = type(given.initial).__name__
        how = (
            "initial=module.state_dict()"
            if isinstance(given.initial, nn.Module)
            else ("tensors by name, e.g. safetensors.torch.load_file(path)")
        )
        raise ConfigError(f"initial: got {kind}, expected a state dict; hand over {how}")
    if not isinstance(given.model, nn.Module):
        return given
    return replace(given, model=admitted(given.model, DTYPES.get(config.dtype, torch.float32)))


def _module(made: Any, what: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ConfigError(f"model: {what} gave {type(made).__name__}, expected an nn.Module")
    return made


def initialised(model: nn.Module, initial: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` in ``dtype`` holding ``initial``: parameters, frozen ones too, and statistics.

    Raises:
        ConfigError: if a tensor is missing, misshapen or unknown. Only counters may be missing, and the frozen part of
            a model that is frozen for the most part: it stays the model's.
    """
    out = converted(copied(model), dtype, "cpu")
    wanted = out.state_dict()
    stays = frozen_part(out) if dominant(out) else {}
    trained = dict(out.named_parameters())
    for name, value in initial.items():
        if name not in wanted:
            raise ConfigError(f"initial: the model has no '{name}'{hint(name, wanted)}")
        t = torch.as_tensor(value)
        if name in trained and t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise ConfigError(f"initial: '{name}' holds NaN or infinity; hand over finite weights")
    for name, value in wanted.items():
        if name not in initial:
            if value.is_floating_point() and name not in stays:
                raise ConfigError(f"initial: '{name}' is missing; given: {', '.join(initial) or 'nothing'}")
        elif tuple(value.shape) != tuple(torch.as_tensor(initial[name]).shape):
            shape = tuple(torch.as_tensor(initial[name]).shape)
            raise ConfigError(f"initial: '{name}' has shape {shape}, expected {tuple(value.shape)}")
    given = {k: torch.as_tensor(v) for k, v in initial.items()}
    same = {k for k in stays if k in given and torch.equal(given[k].to(wanted[k].dtype), wanted[k])}
    out.load_state_dict({k: v for k, v in given.items() if k not in same}, strict=False)
    if any(k in given and k not in same for k in stays):
        is_no_base(out)
    return share(out)


def fitted(model: nn.Module, traits: Traits) -> nn.Module:
    """``model``, or a copy as a method trains it: without what it leaves ``frozen``, with places for changes of bases,
    and knowing which parts of its vectors may be ``silent``.

    Raises:
        ConfigError: if a pattern fits no trained parameter, or there are no adapters whose bases could change.
    """
    if not (traits.frozen or traits.silent or traits.changes_base):
        return model
    out = copied(model)
    frozen = {n for pattern in traits.frozen for n in matching(out, pattern)}
    for name in frozen:
        out.get_parameter(name).requires_grad_(False)
    frozen_by_method(out, frozenset(frozen))
    if traits.changes_base:
        changeable(out)
    silent = [{n for pattern in part for n in matching(out, pattern)} for part in traits.silent]
    trained = {n for n, p in out.named_parameters() if p.requires_grad}
    only_travel(out, [trained - names for names in silent])
    return share(out)


def matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of the trained parameters that fit ``pattern``, or for ``NO_ADAPTERS`` are no adapter's.

    Raises:
        ConfigError: if none does.
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    if pattern == NO_ADAPTERS:
        return outside_adapters(names)
    found = [n for n in names if fnmatchcase(n, pattern)]
    if not found:
        raise ConfigError(
            f"strategy: no trained parameter fits the pattern {pattern!r}{hint(pattern, names)}; adapters come by "
            "model=hf model.lora={r: 4}"
        )
    return found


def fresh(config: DictConfig, data: Dataset, given: nn.Module | Callable[[], nn.Module] | None) -> Any:
    """``(peer) -> Weights``: another draw of the initial model for every peer, keyed by the seed and the peer."""
    dtype = DTYPES[config.dtype]

    def draw(peer: int) -> Weights:
        drawn = _drawn_again(given, config.seed, peer) if isinstance(given, nn.Module) else None
        return FlatModel(drawn or model(config, data, given, peer), dtype).weights

    return draw


def _drawn_again(module: nn.Module, seed: int, peer: int) -> nn.Module:
    """A copy whose layers draw their weights anew, as torch's own layers can."""
    out = copied(module)
    covered: set[int] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "model", peer) >> 1)
        for layer in out.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
                covered |= {id(p) for p in layer.parameters(recurse=False)}
    for name, p in out.named_parameters():
        if id(p) not in covered and p.requires_grad:
            raise ConfigError(
                f"model: a fresh start per peer was asked for, but '{name}' lies in a layer without "
                "reset_parameters(); hand over a function that builds the model, or type strategy.init=shared"
            )
    return out
