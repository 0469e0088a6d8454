"""What is learned: the configured kind of problem, or what was handed over in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig
from torch import nn

from fedsim.config.parts import part
from fedsim.errors import ConfigError
from fedsim.run.given import Given
from fedsim.task.losses import admitted_loss, cross_entropy, is_binary, logits_cross_entropy, own_loss
from fedsim.task.metrics import admitted_metrics
from fedsim.task.problems import Problem
from fedsim.task.task import Task


def problem(config: DictConfig, given: Given) -> Problem:
    """The configured kind, with a loss, a forward pass and metrics that were handed over in place of its own.

    Raises:
        ConfigError: if it is no kind of task.
    """
    found = part(config.task, "task")
    if not isinstance(found, Problem):
        raise ConfigError(
            f"task: {config.task.get('_target_')} gave {type(found).__name__}, expected a fedsim.task.problems.Problem"
        )
    if given.loss is not None:
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


def task_of(problem: Problem, model: nn.Module, output: Any = None, **known: Any) -> Task:
    """The task that ``problem`` makes of ``model``, whose ``output`` of two samples says how its loss is found."""
    metrics = None if problem.metrics is None else admitted_metrics(problem.metrics)
    loss = admitted_loss(problem.loss) if problem.loss is not None else _natural(output)
    return Task(
        model,
        loss,
        metrics,
        forward=problem.forward,
        count=problem.count,
        derived=problem.derived,
        besides=problem.besides,
        **known,
    )


def _natural(output: Any) -> Any:
    """The loss where none is named: the one that the output holds, else cross entropy of its logits."""
    if getattr(output, "loss", None) is not None:
        return own_loss
    return logits_cross_entropy if hasattr(output, "logits") else cross_entropy
