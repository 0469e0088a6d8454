"""Runs that are another run but for who takes part: where they lie, and whether they need to be computed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from fedsim.config.compose import load, plain, typed
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError, DataError
from fedsim.replay.again import handed_over, serially
from fedsim.run.key import Finished, finished_in, run_name, same_run
from fedsim.tracking.rows import rows_of, stream_rows

# Partitions by which samples that were set apart before are nobody's
BY_CHANCE = tuple(f"fedsim.data.partition.{name}" for name in ("dirichlet", "iid", "quantity", "shards"))
PLAIN_RULES = ("Uniform", "Weighted", "RoundRobin")  # sampling rules that look at nothing but sizes and a key


@dataclass(frozen=True)
class BaseRun:
    """A finished run, of which others are computed without some clients."""

    dir: Path
    config: DictConfig

    @staticmethod
    def of(folder: Path) -> BaseRun:
        """The run in ``folder``.

        Raises:
            ConfigError: if it is not finished, or cannot be computed again from its folder alone.
        """
        if not (folder / "metrics.jsonl").is_file():
            raise ConfigError(f"{folder}: no run folder: it has no metrics.jsonl")
        config = load(folder / "config.yaml")
        if (folder / "deployment.json").exists():
            own = json.loads((folder / "deployment.json").read_text()).get("own_data")
            why = (
                "the nodes brought their own data, which are not here"
                if own
                else "clients are at their nodes"
            )
            raise ConfigError(
                f"{folder}: a deployment: {why}; only simulations are computed without some clients"
            )
        if objects := handed_over(config):
            raise ConfigError(
                f"{folder}: {' and '.join(objects)} of this run were handed over in Python; call "
                "simulate([..., 'exclude=[K]'], ...) with the same arguments"
            )
        if finished_in(folder, config) is None:
            raise ConfigError(
                f"{folder}: not finished; type its own command again, which goes on where it stopped"
            )
        return BaseRun(folder, config)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        return rows_in(self.dir)

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """Of the finished run."""
        return dict(json.loads((self.dir / "summary.json").read_text()))

    @cached_property
    def clients(self) -> list[int]:
        """Ids of those who can take part."""
        gone = set(map(int, self.config.exclude))
        return [c for c in range(int(self.config.num_clients)) if c not in gone]

    def variant(self, **changes: Any) -> DictConfig:
        """The settings of the run with ``changes``, in a folder beside it that is named by its key."""
        values = plain(self.config) | {"resume": "auto", "dir": None} | changes
        config = typed(values)
        config.dir = str(self.dir.parent / run_name(config))
        return config

    def without(self, clients: Collection[int], **changes: Any) -> DictConfig:
        """The settings of the run without ``clients``; the run itself if that is nobody."""
        gone = sorted({*map(int, self.config.exclude), *clients})
        config = self.variant(exclude=gone, **changes)
        if same_run(self.dir, config):
            config.dir = str(self.dir)
        return config

    def first_met(self, clients: Collection[int]) -> int | None:
        """The first round (from 1) in which any of ``clients`` was asked for anything; ``None`` if in none."""
        wanted = set(clients)
        met = [int(row["round"]) for row in self.rows if wanted & set(row.get("cohort") or ())]
        met += [int(row["round"]) for row in self.rows if any(f["client"] in wanted for f in row["failures"])]
        path = self.dir / "clients.jsonl"
        if not path.is_file():
            raise DataError(f"{path}: is not there, and tells when clients were first asked for anything")
        for row in stream_rows(path):
            if row["client"] in wanted:
                met.append(int(row["round"]))
                break
        return min(met, default=None)

    @cached_property
    def reason_for_all(self) -> str:
        """Why a client matters before it is asked for the first time; empty if it does not."""
        return self.reason()

    def reason(self, samples_only: bool = False) -> str:
        """The same; with ``samples_only`` some of its samples are left out and it stays among the clients."""
        from fedsim.run.participants import strategy

        config, method = self.config, strategy(self.config, None)
        kind, rule = type(method), str(config.sampling.get("_target_")).rpartition(".")
        if method.traits.pooled:
            return "all clients' samples lie in one place"
        if method.traits.meets_all_clients:
            return f"{kind.__name__} asks all clients before its first round"
        own = kind.__module__.startswith("strategies.") or "traits" in vars(kind)
        if not (method.traits.asked_only and own):
            return f"{kind.__name__} does not say that only clients asked so far count (traits.asked_only)"
        if method.traits.counts_clients and not samples_only:
            return f"{kind.__name__} computes with the number of all clients, so without one every round is another"
        apart = config.evaluation.validation or OmegaConf.select(config, "data.labelled.at") == "server"
        if apart and config.partition.get("_target_") not in BY_CHANCE:
            return "some of its samples may be among those set apart beforehand (evaluation.validation, data.labelled)"
        if rule[2] not in PLAIN_RULES or not rule[0].startswith("fedsim.sampling"):
            return f"sampling={rule[2]} chooses among candidates"
        if config.pretrain or config.topology:
            return (
                "all clients' samples are pretrained on" if config.pretrain else "it would be another graph"
            )
        if config.audit.canaries:
            return "canaries are drawn from, and dealt to, those who are there (audit.canaries)"
        if config.attack and "value" in config.attack and config.attack["value"] is None:
            return "the trigger is as the largest of all samples (attack.value)"
        if config.evaluation.by_class:
            return "classes are grouped by all clients' samples (evaluation.by_class)"
        return ""

    def cohorts(self, gone: Collection[int], seed: int) -> tuple[tuple[int, ...], ...] | None:
        """The cohorts under ``seed`` of a run without the clients ``gone`` too; ``None`` where nothing tells them yet.

        Runs with the same cohorts are the same run, where ``reason_for_all`` is empty.
        """
        sized = seed != self.config.seed and not str(self.config.sampling._target_).endswith(".Uniform")
        if self.reason_for_all or self.config.system or not self._sizes or sized:
            return None
        from fedsim.config.parts import part
        from fedsim.run import assigning
        from fedsim.sampling import Population

        config = self.config
        absent = frozenset({*assigning.absent(self.variant(seed=seed))[0], *gone})
        people = Population(np.array(self._sizes), seed, None, config.participation)
        people.absent, people.fill = absent, config.exclude_fill == "substitute"
        rule, count = part(config.sampling, "sampling"), min(int(config.clients_per_round), len(self._sizes))
        drawn = (rule(people, count, t) for t in range(int(config.rounds)))
        return tuple(tuple(people.there(ids, t) if absent else ids) for t, ids in enumerate(drawn))

    @property
    def trained(self) -> list[int]:
        """Samples that each client trains on; empty where the folder does not tell, or canaries are among them."""
        return [] if self.config.audit.canaries else self._sizes

    @cached_property
    def _sizes(self) -> list[int]:
        try:
            return [int(n) for n in Shards.load(self.dir / "partition.npz").sizes]
        except DataError:
            return []


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl of the finished run in ``folder``.

    Raises:
        DataError: if it lacks rounds that were finished.
    """
    return rows_of(folder, int(json.loads((folder / "summary.json").read_text()).get("rounds", 0)))


def existing(config: DictConfig) -> Finished | None:
    """The run of these settings, if it is finished in its folder."""
    folder = Path(config.dir)
    found = finished_in(folder, config)
    return found if found is not None and same_run(folder, config) else None


def compute(configs: Sequence[DictConfig], workers: int = 1, say: Callable[[str], None] = print) -> None:
    """Compute those of these runs that are not done; each goes on from its checkpoint if it was begun.

    ``workers``: processes that compute one run each, on the serial engine. What is done stays when one fails.
    """
    todo = [config for config in configs if existing(config) is None]
    names = [f"exclude={list(config.exclude)} seed={config.seed} {config.dir}" for config in todo]
    if workers > 1 and len(todo) > 1:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            jobs = [pool.submit(_alone, plain(serially(config))) for config in todo]
            for number, (job, name) in enumerate(zip(jobs, names, strict=True), 1):
                job.result()
                say(f"run {number} of {len(todo)}: {name}")
        return
    try:
        for number, (config, name) in enumerate(zip(todo, names, strict=True), 1):
            say(f"run {number} of {len(todo)}: {name}")
            run_quietly(config)
    finally:
        cluster: Any = sys.modules.get("fedsim.engine.ray.cluster")
        if cluster is not None:
            cluster.shutdown()


def run_quietly(config: DictConfig) -> None:
    """Run, with nothing on the terminal but failures."""
    from fedsim.api import run

    config.tracker.console.mode, config.tracker.plots = "quiet", False
    run(config)


def _alone(values: dict[str, Any]) -> None:
    run_quietly(typed(values))
