"""``model.json``: what has to be known to use the weights of a run, and how its model is built again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from fedsim.config.compose import plain
from fedsim.data.federated import FederatedData
from fedsim.errors import CheckpointError, ConfigError
from fedsim.run import initial
from fedsim.run.given import Given
from fedsim.run.key import method_name, version
from fedsim.server.weightsfile import LAST
from fedsim.task.copies import copied
from fedsim.task.lowrank import CHANGE, changeable
from fedsim.task.standalone import standalone, structure, tensors
from fedsim.task.task import Task

CARD = "model.json"
Card = Mapping[str, Any]


def write(
    folder: Path,
    config: DictConfig,
    given: Given,
    task: Task,
    data: FederatedData,
    weights: Mapping[str, Tensor],
    rounds: int,
) -> Card:
    """Describe the ``weights`` of ``weights.safetensors``, beside it.

    ``input`` is one sample as the model gets it, normalised (or embedded by the ``encoder``); ``built_with`` goes to
    the configured model's factory beside its options; ``structure`` is a hash of all names and shapes. ``frozen`` is
    ``apart`` where tensors that are not trained are left out of the file.
    """
    dataset, held = data.dataset, tensors(task.model)
    card = {
        "format": 1,
        "fedsim": version(),
        "method": method_name(config),
        "model": plain(config)["model"],
        "class": f"{type(task.model).__module__}.{type(task.model).__qualname__}",
        "built_with": initial.shape_of(dataset, config),
        "input": None if task.example is None else tree_map(_kind, task.example, is_leaf=_packed),
        "classes": list(dataset.classes),
        "normalize": None if dataset.normalize is None else asdict(dataset.normalize),
        "columns": list(dataset.columns or given.columns),
        "encoder": plain(config)["encoder"],
        "dtype": config.dtype,
        "rounds": rounds,
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "frozen": "apart" if held.keys() - weights.keys() else "held",
        "structure": structure(held),
        "sha256": sha256(folder / LAST),
    }
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
    return card


def _kind(x: Any) -> Any:
    """Shape and type of one of the samples ``x`` (n, ...); of what a collate function put beside tensors its class,
    or the plain value."""
    if not isinstance(x, Tensor):
        kind = type(x)
        return x if isinstance(x, str | int | float) else {"class": f"{kind.__module__}.{kind.__qualname__}"}
    return {"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")}


def _packed(x: Any) -> bool:
    """Whether it is a tuple whose entries torch itself looks into."""
    return isinstance(x, PackedSequence)


def is_kind(node: Any) -> bool:
    """Whether ``node`` describes one tensor of an input."""
    return isinstance(node, dict) and node.keys() == {"shape", "dtype"} and isinstance(node["dtype"], str)


def sha256(file: Path) -> str:
    """Of a file, 64 hex digits."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read(folder: Path) -> Card | None:
    """The card of a finished run; ``None`` of one by an earlier version of fedsim, which has none.

    Raises:
        CheckpointError: if it cannot be read, or the weights beside it are others.
    """
    try:
        card = json.loads((folder / CARD).read_text())
        known = card["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CARD} is damaged ({type(error).__name__}: {error})") from error
    if sha256(folder / LAST) != known:
        raise CheckpointError(
            f"{folder / LAST} is not the file that {CARD} beside it describes: it was changed"
        )
    return card  # type: ignore[no-any-return]


def filled(
    config: DictConfig, given: Given, card: Card | None, state: Mapping[str, Tensor], folder: Path
) -> nn.Module:
    """The run's model, configured or handed over, holding ``state``: a copy in evaluation mode.

    Raises:
        ConfigError: if it was handed over in Python and is not here, or is another one than was trained.
    """
    if given.model is None and "given" in config.model:
        raise ConfigError(
            f"{folder}: its model ({config.model.given}) was handed over in Python; hand it over again: "
            f"fedsim.load_run({str(folder)!r}, model=...)"
        )
    frozen_apart = card is not None and card["frozen"] == "apart"
    empty = initial.built(config, _shape(config, given, card), given.model)
    if any(name.rpartition(".")[2] == CHANGE for name in state):
        empty = changeable(copied(empty))
    return standalone(empty, state, initial.DTYPES[config.dtype], frozen_apart=frozen_apart)


def _shape(config: DictConfig, given: Given, card: Card | None) -> Mapping[str, Any]:
    """What the model's factory is told of the data: as recorded, else from the data themselves."""
    if given.model is not None:
        return {}
    if card is not None:
        stated = card["built_with"]
        return {**stated, "input_shape": _tuples(stated["input_shape"])}
    from fedsim.run.participants import strategy
    from fedsim.run.preparation import load_data

    return initial.shape_of(load_data(config, given, strategy(config, given.strategy)).dataset, config)


def _tuples(node: Any) -> Any:
    """Shapes as tuples again: JSON has lists only."""
    if isinstance(node, dict):
        return {k: _tuples(v) for k, v in node.items()}
    return tuple(map(_tuples, node)) if isinstance(node, list) else node


def example(card: Card, count: int = 2) -> Any:
    """Zeros (``count``, ...) of the form that the model takes: a tensor, or a tree of them."""
    return _zeros(card["input"], count)


def _zeros(node: Any, count: int) -> Any:
    if is_kind(node):
        return torch.zeros(count, *node["shape"], dtype=getattr(torch, node["dtype"]))
    if isinstance(node, dict) and node.keys() == {"class"} and isinstance(node["class"], str):
        raise ConfigError(
            f"the model takes a {node['class']}, of which there is no example; use --to safetensors"
        )
    if isinstance(node, dict):
        return {k: _zeros(v, count) for k, v in node.items()}
    return tuple(_zeros(v, count) for v in node) if isinstance(node, list) else node
