"""What is learned: the configured kind of problem, or what was handed over in Python."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from fedsim.config.parts import part
from fedsim.errors import ConfigError
from fedsim.run.given import Given
from fedsim.task.losses import (
    admitted_loss,
    cross_entropy,
    is_binary,
    logits_cross_entropy,
    own_loss,
    weighed,
)
from fedsim.task.metrics import admitted_metrics
from fedsim.task.problems import Problem, tokens_of
from fedsim.task.task import Task

IDLE = {
    "label_smoothing": 0.0,
    "loss": "mse",
    "quantiles": [0.5],
}  # options that only a task's own loss reads


def problem(config: DictConfig, given: Given) -> Problem:
    """The configured kind, with a loss, a forward pass and metrics that were handed over in place of its own.

    Raises:
        ConfigError: if it is no kind of task.
    """
    for key in config.task:
        if OmegaConf.is_missing(config.task, key):
            raise ConfigError(f"task.{key}: must be given with this task, e.g. task.{key}=21")
    found = part(config.task, "task")
    if not isinstance(found, Problem):
        raise ConfigError(
            f"task: {config.task.get('_target_')} gave {type(found).__name__}, expected a fedsim.task.problems.Problem"
        )
    if given.loss is not None:
        _check_loss(config, given.loss)
        measured = found.metrics if found.raw else None
        found = Problem(
            given.loss,
            measured,
            found.forward,
            count=found.count if found.raw else None,
            targets="labels" if is_binary(given.loss) else "",
            besides=found.besides,
        )
    if given.metrics is not None:
        if not isinstance(given.metrics, Mapping):
            admitted_metrics(given.metrics)
        own = found.metrics is None
        found = replace(
            found, metrics={**(found.metrics or {}), **given.metrics}, besides=found.besides or own
        )
    return found if given.forward is None else replace(found, forward=given.forward)


def _check_loss(config: DictConfig, loss: Any) -> None:
    """Refuse a loss that is no mean, has weights of its own, or takes the place of one that was configured."""
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    if isinstance(loss, nn.Module):
        options = vars(loss)
    if (how := options.get("reduction", "mean")) in ("sum", "none"):
        raise ConfigError(
            f"loss: reduction='{how}' depends on how many samples a batch has; give reduction='mean' (for the steps of "
            "a sum, client.lr times client.batch_size)"
        )
    if isinstance(loss, nn.Module):
        trained = [name for name, p in loss.named_parameters() if p.requires_grad]
        if trained:
            raise ConfigError(
                f"loss: {type(loss).__name__} has the parameter '{trained[0]}' of its own, which nobody would train; "
                "make it a part of the model, or type .requires_grad_(False)"
            )
    own, measured = options.get("ignore_index"), config.task.get("ignore_index")
    if own is not None and measured is not None and own != measured:
        raise ConfigError(
            f"loss: leaves out the class {own}, metrics leave out task.ignore_index={measured}; type "
            f"task.ignore_index={own}"
        )
    for key, idle in IDLE.items():
        value = config.task.get(key, idle)
        if value is not None and value != idle and not OmegaConf.is_dict(value):
            raise ConfigError(f"task.{key}={value}: has no effect beside loss=...; leave one of them out")


def task_of(problem: Problem, model: nn.Module, output: Any = None, **known: Any) -> Task:
    """The task that ``problem`` makes of ``model``, whose ``output`` of two samples says how its loss is found."""
    metrics = None if problem.metrics is None else admitted_metrics(problem.metrics)
    loss = admitted_loss(problem.loss) if problem.loss is not None else _natural(output)
    kinds = {"count": problem.count, "derived": problem.derived, "besides": problem.besides}
    x = known.get("example")
    y = x.get("labels") if isinstance(x, Mapping) else None
    units = tokens_of(output, y) if loss is own_loss else weighed(loss)
    return Task(model, loss, metrics, forward=problem.forward, weighed=units, **kinds, **known)  # type: ignore[arg-type]


def _natural(output: Any) -> Any:
    """The loss where none is named: the one that the output holds, else cross entropy of its logits."""
    if getattr(output, "loss", None) is not None:
        return own_loss
    return logits_cross_entropy if hasattr(output, "logits") else cross_entropy
