"""The models of other architectures than the run's that classes of clients train, each built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.local.kinds import models
from fedsim.run.given import Given
from fedsim.run.initial import DTYPES
from fedsim.run.preparation import learning_task
from fedsim.run.samples import example
from fedsim.server.context import Architecture
from fedsim.task.copies import copied
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel


def tasks(config: DictConfig, given: Given, data: FederatedData) -> list[Task]:
    """The task of each model that ``client.classes`` names, 1, 2, ... as ``fedsim.local.kinds.models`` counts them.

    Each is drawn by the run's seed as the run's own model is, whatever other classes there are.

    Raises:
        ConfigError: naming the class, for a model that cannot be built or trained.
    """
    rows = OmegaConf.to_container(config.client, resolve=True)["classes"]  # type: ignore[call-overload,index]
    nodes, out = models(rows), list[Task]()
    for node in nodes:
        own = config.copy()
        own.model = node
        try:
            out.append(learning_task(own, replace(given, model=None, initial=None), data))
        except ConfigError as error:
            first = next(i for i, row in enumerate(rows) if row.get("model") == node)
            raise ConfigError(f"client.classes[{first}]: {error}") from error
    return out


def with_layouts(config: DictConfig, others: Sequence[Task]) -> tuple[Architecture, ...]:
    """The same with layouts and first weights."""
    flat = [FlatModel(copied(task.model), DTYPES[config.dtype]) for task in others]
    return tuple(Architecture(t, m.layout, m.weights) for t, m in zip(others, flat, strict=True))


def efforts(config: DictConfig, task: Task, others: Sequence[Task], data: FederatedData) -> tuple[float, ...]:
    """Floating-point operations of each as a share of the run's model's; needed where devices are simulated."""
    if not config.system or not others:
        return (1.0,) * len(others)
    from fedsim.system.cost import count_flops

    dtype = DTYPES[config.dtype]
    seen = example(data, dtype)
    whole, *each = (count_flops(t, dtype, seen).gradient for t in (task, *others))
    return tuple(one / whole for one in each)
