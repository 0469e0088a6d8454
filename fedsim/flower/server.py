"""The ServerApp: waits for the nodes, then runs the same loop as a simulation on them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig

from fedsim.api import RunResult, load_run, run
from fedsim.config.parts import typed
from fedsim.config.schema import FlowerConfig
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.sample_roles import Roles
from fedsim.data.shards import Shards
from fedsim.data.trees import tree_map
from fedsim.errors import CheckpointError, ConfigError, EngineError
from fedsim.flower.engine import FlowerEngine
from fedsim.flower.nodes import Known, Nodes
from fedsim.flower.options import configuration, deployable, keeps_samples, own_folder
from fedsim.flower.site import layout_name
from fedsim.flower.stopping import StoppableGrid, alone, stoppable
from fedsim.run import assigning, initial, samples
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
    """One run, from its first round or from its checkpoint on."""
    with stoppable():
        serve(cast(Grid, StoppableGrid(grid)), configuration(context.run_config))


def serve(grid: Grid, config: DictConfig) -> RunResult:
    """Run ``config`` on the nodes of ``grid``; results lie in its folder as those of a simulation do."""
    config.dir, method = own_folder(config), deployable(config)
    folder, engine = Path(config.dir), typed(config.engine, FlowerConfig)
    if (found := finished(config)) is not None:
        log.warning("already done, not run again: %s", found)
        return load_run(folder)
    if config.resume == "auto" and checkpoint.latest(folder / "checkpoint") and not same_run(folder, config):
        raise CheckpointError(
            f"{folder} holds another run; give another dir, or resume=never to start afresh"
        )
    with alone(folder):
        return _serve(grid, config, method, folder, engine)


def _serve(
    grid: Grid, config: DictConfig, method: StrategyLike, folder: Path, engine: FlowerConfig
) -> RunResult:
    nodes = Nodes(grid, config.num_clients, path=folder / "nodes.jsonl")
    nodes.wait(engine.wait_for or config.num_clients, engine.start, engine.poll)
    data = _data(config, method, nodes)
    nodes.check = _Check(config, data, own=any(node.own for node in nodes.of.values()))
    for node in nodes.of.values():
        if why := nodes.check(node):
            raise EngineError(f"client {node.client}, {node.name}: {why}")
    return run(config, engine=FlowerEngine(grid, nodes, engine, folder), split=data)


def _data(config: DictConfig, method: StrategyLike, nodes: Nodes) -> FederatedData:
    """The server's own view: the test set, and who has how much. Where nodes own their data, it holds none of them."""
    owners = [n.client for n in nodes.of.values() if n.own]
    if not owners:
        return load_data(config, Given(), method)
    keeps_samples(method)
    if len(owners) < config.num_clients:
        raise ConfigError(
            f"clients {sorted(owners)} have own-data, the others do not or are not there; "
            "all nodes must be started before round 1, and alike"
        )
    return _counted(config, samples.dataset(config), [nodes.of[c] for c in range(config.num_clients)])


def _counted(config: DictConfig, dataset: Dataset, owners: Sequence[Known]) -> FederatedData:
    """What the server knows of data that never come to it: whose they are, how many, and how many of each class."""
    (x, y), total = dataset.train.take(torch.arange(1)), sum(node.samples for node in owners)
    x, y = (tree_map(lambda t: t.expand(total, *t.shape[1:]), tree) for tree in (x, y))
    if dataset.class_labels() is not None:
        for node in owners:
            if len(node.counts) != dataset.num_classes:
                raise ConfigError(
                    f"client {node.client}, {node.name}: its data have {len(node.counts)} classes, "
                    f"the server's {dataset.num_classes}"
                )
        counts = torch.tensor([node.counts for node in owners]).flatten()
        y = torch.arange(dataset.num_classes).repeat(len(owners)).repeat_interleave(counts).to(y.dtype)
    train = Samples(x, y)  # stand-ins of the right shape, never read
    ends = np.cumsum([0, *(node.samples for node in owners)]).astype(np.int64)
    shards = Shards(np.arange(total, dtype=np.int64), ends)
    groups = {split: columns for split, columns in dataset.groups.items() if split != "train"}
    known = replace(dataset, train=train, ids=None, groups=groups)
    found = FederatedData(known, shards)
    if config.evaluation.local_test:
        found = samples.tested(config, known, shards)
    return assigning.assigned(config, found, shards, Roles(), counted=True)


class _Check:
    """Whether a node has the same model, and the same partition of the same data, as the server."""

    def __init__(self, config: DictConfig, data: FederatedData, own: bool):
        built = initial.model(config, data.dataset, None)
        self.base = base_of(built)
        self.layout = layout_name(FlatModel(built, initial.DTYPES[config.dtype]))
        self.partition, self.own = data.shards.hash(), own

    def __call__(self, node: Known) -> str:
        if node.own != self.own:
            return f"own-data={str(node.own).lower()}, but the run began with {str(self.own).lower()}"
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
        return ""
