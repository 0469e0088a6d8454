"""What a caller hands over in Python: recorded in the configuration, and told apart by content."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from fedsim.config.code import digest
from fedsim.data.dataset import Augment, Pair
from fedsim.data.joining import content_hash
from fedsim.data.trees import tree_map
from fedsim.errors import ConfigError
from fedsim.rng import hash_tensors
from fedsim.run.key import says
from fedsim.task.losses import Forward, LossFn


@dataclass(frozen=True)
class Given:
    """What a caller hands over in Python instead of naming it in the configuration.

    Args:
        model: a module, or a factory called under the run's seed; default: ``config.model``.
        clients: one ``(x, y)`` pair per client, instead of ``config.data`` and ``config.partition``; ``x`` and ``y``
            may be trees, ``y`` may be ``None``, and a torch data set or data loader stands for a pair.
        data: the samples of all, to be split by ``config.partition``: as one client's, or a ``fedsim.data.Dataset``.
        test: ``(x, y)`` of the common test set, with ``clients`` or ``data``; or one such pair per domain, by name.
        validation: ``(x, y)`` of a common validation set, instead of ``evaluation.validation``.
        server: ``(x, y)`` of labelled samples of the server's own (``server.data``), instead of ``data.server``.
        domains: name of each client's domain, with ``clients``.
        loss: ``(model output, y) -> scalar``, or ``(model, batch) -> scalar``, the mean over the batch; default: what
            ``config.task`` says.
        metrics: by name, functions ``(output, y)`` that return a mean or (sum, count), or torchmetrics objects.
        forward: ``(model, x) -> output``; default: a dict is passed by keyword, a tuple by position.
        augment: ``(raw batch x, generator) -> x``, applied to training batches.
        initial: state dict that the run starts from.
        cohorts: client ids of each round, instead of sampling.
        strategy: a strategy object or class, instead of ``config.strategy``.
        callbacks: objects with any of the hooks of ``fedsim.Callback`` or ``fedsim.tracking.Tracker``.
        classes: names of the classes, found in ``clients`` and ``test`` (``fedsim.run.samples.admitted``).
        columns: names of the inputs' columns, found there too; empty where they are no tables.
    """

    model: nn.Module | Callable[[], nn.Module] | None = None
    clients: Sequence[Any] | None = None
    data: Any = None
    test: Pair | Mapping[str, Pair] | None = None
    validation: Any = None
    server: Any = None
    domains: Sequence[str] | None = None
    loss: LossFn | None = None
    metrics: Mapping[str, Any] | None = None
    forward: Forward | None = None
    augment: Augment | None = None
    initial: Mapping[str, Tensor] | None = None
    cohorts: Sequence[Sequence[int]] | None = None
    strategy: Any = None
    callbacks: Sequence[object] = ()
    classes: Sequence[str] = ()
    columns: Sequence[str] = ()

    def record(self, config: DictConfig) -> None:
        """Let the recorded configuration name what was handed over, not what it stands for (in place)."""
        with open_dict(config):
            if self.strategy is not None:
                config.strategy = {"_target_": _path(self.strategy), "given": _settings(self.strategy)}
                if says(self.strategy, "horizon"):
                    config.strategy["horizon"] = True
            if self.model is not None:
                head = config.model.get("head")
                config.model = {"given": _path(self.model)} | ({} if head is None else {"head": head})
            if self.clients is not None:
                config.data = {"given": f"{len(self.clients)} clients", **_roles(config.data)}
                config.partition = {"given": f"{len(self.clients)} clients"}
            if self.data is not None:
                config.data = {"given": type(self.data).__name__, **_roles(config.data)}

    def fingerprint(self, *, alone: bool = False) -> str:
        """Identifies the handed-over parts in a checkpoint, code and values; empty if there are none.

        Raises:
            ConfigError: if a part holds what cannot be told apart by content, unless the run is ``alone``: in a new
                folder, where none can be taken for it.
        """
        parts: list[str] = []
        if self.model is not None:
            parts.append(f"model{_digest('model', self.model, alone)}")
        tests = (
            list(self.test.values()) if isinstance(self.test, Mapping) else [self.test] if self.test else []
        )
        more = {k: v for k in ("validation", "server") if (v := getattr(self, k)) is not None}
        pairs = [*(self.clients or ()), *tests, *map(_halves, more.values())]
        if more:
            parts.append("+".join(more))
        if self.domains is not None:
            parts.append(
                f"domains{list(self.domains)}{list(self.test or ()) if isinstance(self.test, Mapping) else ''}"
            )
        if pairs:
            parts.append("data" + content_hash(pairs))
        if self.data is not None:
            parts.append("split" + content_hash([self.data]))
        if self.initial is not None:
            parts.append("initial" + hash_tensors(torch.as_tensor(t) for t in self.initial.values()))
        if self.cohorts is not None:
            parts.append(f"cohorts{[list(map(int, c)) for c in self.cohorts]}")
        own = ("strategy", "loss", "metrics", "forward", "augment")
        for name, thing in ((name, getattr(self, name)) for name in own):
            if thing is not None:
                parts.append(f"{name}{_digest(name, thing, alone)}")
        return "/".join(parts)


def _roles(node: DictConfig) -> dict[str, Any]:
    """What is said of samples of any source."""
    return {k: node[k] for k in ("labelled", "server") if k in node}


def _halves(part: Any) -> tuple[Any, Any]:
    """Inputs and targets of validation or server samples (``containers.Part``); text as bytes that tell it apart."""

    def number(values: Any) -> Any:
        if not isinstance(values, np.ndarray) or isinstance(values, np.memmap):
            return values
        return torch.tensor(list("\0".join(map(str, values.reshape(-1))).encode()), dtype=torch.uint8)

    return (
        (part.read, None) if part.read is not None else (tree_map(number, part.x), tree_map(number, part.y))
    )


def _digest(name: str, thing: Any, alone: bool) -> str:
    try:
        return digest(name, thing)
    except ConfigError:
        if not alone:
            raise
        return secrets.token_hex()


def _path(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _settings(thing: Any) -> dict[str, Any]:
    """The plain attributes of a strategy object."""
    own = {} if isinstance(thing, type) else getattr(thing, "__dict__", {})
    return {k: v for k, v in own.items() if isinstance(v, bool | int | float | str) and not k.startswith("_")}
