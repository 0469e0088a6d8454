"""The ServerApp: waits for the nodes, then runs the same loop as a simulation on them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig

from fedsim.api import RunResult, load_run, run
from fedsim.config.compose import plain
from fedsim.config.parts import as_dataclass
from fedsim.config.schema import FlowerConfig
from fedsim.config.words import refuse_twice
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.normalising import with_given
from fedsim.data.sample_roles import Roles
from fedsim.data.shards import Stated
from fedsim.data.trees import tree_map
from fedsim.errors import CheckpointError, ConfigError, DataError, EngineError
from fedsim.flower import contract, present
from fedsim.flower.binding import Binding
from fedsim.flower.engine import FlowerEngine
from fedsim.flower.introductions import Known, Limits
from fedsim.flower.nodes import Nodes
from fedsim.flower.options import configuration, deployable, keeps_samples, own_folder, words
from fedsim.flower.pieces import leave_apart
from fedsim.flower.site import layout_name
from fedsim.flower.stopping import StoppableGrid, alone, stoppable
from fedsim.flower.taking import Taking
from fedsim.run import agreement, assigning, initial, samples
from fedsim.run.given import Given
from fedsim.run.key import finished, same_run
from fedsim.run.preparation import load_data
from fedsim.server import checkpoint
from fedsim.server.traits import StrategyLike
from fedsim.task.frozen import FrozenBase, base_of
from fedsim.task.vectors import FlatModel

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from its first round or from its checkpoint on.

    Raises:
        ConfigError: for settings that cannot be, or that are typed twice.
    """
    with stoppable():
        refuse_twice(words(context.run_config))
        serve(cast(Grid, StoppableGrid(grid)), configuration(context.run_config))


def serve(grid: Grid, config: DictConfig) -> RunResult:
    """Run ``config`` on the nodes of ``grid``; results lie in its folder as those of a simulation do."""
    config.dir, method = own_folder(config), deployable(config)
    folder, engine = Path(config.dir), as_dataclass(config.engine, FlowerConfig)
    if without := contract.began(config, folder).get("without"):
        log.warning("the run in %s began without clients %s, and goes on so", folder, without)
        config.exclude = sorted({*config.exclude, *without})
    if (found := finished(config)) is not None:
        log.warning("already done, not run again: %s", found)
        return load_run(folder)
    if config.resume == "auto" and checkpoint.latest(folder / "checkpoint") and not same_run(folder, config):
        raise CheckpointError(
            f"{folder} holds another run; give another dir, or resume=never to start afresh"
        )
    leave_apart()
    with alone(folder):
        return _serve(grid, config, method, folder, engine)


def _serve(
    grid: Grid, config: DictConfig, method: StrategyLike, folder: Path, engine: FlowerConfig
) -> RunResult:
    agreement.of(config)  # says what of it cannot be
    taking = Taking(engine.deadline)
    taking.begin()
    binding = Binding.of(plain(config.engine).get("nodes"), config.num_clients)
    binding.check_enough(engine.wait_for or config.num_clients, config.num_clients)
    limits = Limits(config.num_clients, engine.most_samples, lambda: _classes(config))
    nodes = Nodes(grid, config.num_clients, folder / "nodes.jsonl", binding=binding, limits=limits)
    with nodes.noting_end() as end:
        gone = present.gather(nodes, config, engine)
        data, terms = _data(config, method, nodes, folder, gone)
        works = FlowerEngine(grid, nodes, engine, folder, method, terms, taking)
        result = run(config, engine=works, split=data)
        end |= {k: result.summary[k] for k in ("status", "error") if k in result.summary}
    return result


def _classes(config: DictConfig) -> int:
    """How many classes nodes count samples of; 0 where targets are none, or counts would be outside the budget.

    Raises:
        EngineError: the server's data cannot be read, or are not as agreed.
    """
    try:
        return _counts(config, samples.dataset(config))
    except (ConfigError, DataError) as error:
        raise EngineError(
            "\n".join(f"the server's data: {line}" for line in str(error).splitlines())
        ) from error


def _counts(config: DictConfig, dataset: Dataset) -> int:
    return 0 if config.get("privacy") or dataset.class_labels() is None else dataset.num_classes


def _data(
    config: DictConfig, method: StrategyLike, nodes: Nodes, folder: Path, gone: list[int]
) -> tuple[FederatedData, Mapping[str, Any]]:
    """The server's own view: the test set, and who has how much; and what every message carries.

    Where nodes own their data, it holds none of them. Clients that are ``gone``, or are refused here, are excluded.
    """
    before = contract.began(config, folder)
    gone = [*gone, *present.outvoted(nodes, config)]
    owners = [n.client for n in nodes.of.values() if n.own]
    if owners:
        keeps_samples(method)
    if owners and len(owners) + len(gone) < config.num_clients:
        raise ConfigError(
            f"clients {sorted(owners)} have own-data, the others do not or are not there; "
            "all nodes must be started before round 1, and alike"
        )
    whole = None if owners else load_data(config, Given(), method)
    dataset = whole.dataset if whole else with_given(agreement.of(config), samples.dataset(config))
    nodes.check = _Check(config, method, dataset, whole, nodes.of.values(), before)
    gone = [*gone, *present.examine(nodes, config)]
    present.leave_out(nodes, config, gone, bool(before))
    dataset, terms = contract.conclude(
        config, folder, nodes, dataset, sorted(assigning.absent(config)[0]), before
    )
    if whole:
        return (load_data(config, Given(), method) if nodes.without else whole), terms
    known = {c: (n.samples, n.counts) for c, n in nodes.of.items()}
    known |= {int(c): held for c, held in before.get("held", {}).items()}
    none = 0, [0] * _counts(config, dataset)
    return _counted(config, dataset, [known.get(c, none) for c in range(config.num_clients)]), terms


def _counted(
    config: DictConfig, dataset: Dataset, owned: Sequence[tuple[int, Sequence[int]]]
) -> FederatedData:
    """What the server knows of data that never come to it: whose they are, how many, and how many of each class. No
    memory hangs on these numbers."""
    held = dataset.train if len(dataset.train) or dataset.test is None else dataset.test
    x, y = held.take(torch.arange(1))
    classes = _counts(config, dataset)
    said = np.array([counts if classes else [n] for n, counts in owned], dtype=np.int64)
    x, y = (tree_map(lambda t: t.expand(max(classes, 1), *t.shape[1:]), tree) for tree in (x, y))
    if classes:
        y = torch.arange(classes).to(y.dtype)
    train, shards = (
        Samples(x, y),
        Stated.of_counts(said),
    )  # stand-ins of the right shape, for questions asked here
    groups = {split: columns for split, columns in dataset.groups.items() if split != "train"}
    known = replace(dataset, train=train, ids=None, groups=groups)
    found = FederatedData(known, shards, counted=not config.get("privacy"))
    if config.evaluation.local_test:
        found = samples.tested(config, known, shards)
    return assigning.assigned(config, found, shards, Roles(), counted=True)


class _Check:
    """Whether a node has the same model, and the same partition of the same data, as the server."""

    def __init__(
        self,
        config: DictConfig,
        method: StrategyLike,
        dataset: Dataset,
        whole: FederatedData | None,
        present: Iterable[Known],
        before: Mapping[str, Any],
    ):
        built = initial.fitted(initial.model(config, dataset, None), method.traits)
        self.config, self.dataset, self.before = config, dataset, before
        self.base = base_of(built)
        self.layout = layout_name(FlatModel(built, initial.DTYPES[config.dtype]))
        self.own = whole is None  # nodes' own data have no common partition
        self.partition = whole.shards.hash() if whole else ""
        self.sizes = (
            {n.client: n.samples for n in present} if whole is None else dict(enumerate(whole.shards.sizes))
        )

    def __call__(self, node: Known) -> str:
        if node.own != self.own:
            return f"own-data={str(node.own).lower()}, but the run began with {str(self.own).lower()}"
        if self.own and (why := contract.difference(node, self.config, self.dataset)):
            return why
        if why := contract.changed(node, self.before):
            return why
        classes = _counts(self.config, self.dataset)
        if self.own and len(node.counts) != classes:
            return f"it counts {len(node.counts)} classes, the server has {classes}"
        if node.layout != self.layout:
            return "its model has other parameters than the server's; are its data and versions the same?"
        if node.base_sha256 != (self.base.sha256 if self.base else ""):
            theirs = FrozenBase(node.base, node.base_sha256) if node.base_sha256 else "trained as a whole"
            return (
                f"the frozen base of its model is {theirs}, the server's is {self.base or 'trained as a whole'}; load "
                "the same weights on both sides"
            )
        if not self.own and node.partition != self.partition:
            return "its partition of the data differs from the server's; do both read the same data set?"
        if node.samples != (known := self.sizes.get(node.client, node.samples)):
            return f"it says that it has {node.samples} samples; its part of the data has {known}"
        return ""
