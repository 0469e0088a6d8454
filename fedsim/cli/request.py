"""What ``fedsim tune`` is asked for, checked before anything is run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.cli.spaces import Point, Space, untried
from fedsim.cli.trials import overlap, seeds_of
from fedsim.config.check import validate
from fedsim.config.compose import compose, plain
from fedsim.errors import ConfigError
from fedsim.report.objective import Objective
from fedsim.run.key import finished
from fedsim.run.resolve import resolve
from fedsim.run.unread import limit_cohort

SHARE = 0.1  # of the training samples, for choosing, where nothing is said


@dataclass
class Tuning:
    """What is asked for, checked before anything is run."""

    spaces: list[Space]
    common: list[str]
    trials: int
    seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    sampler: str
    extend: int
    root: Path  # folder of the runs
    _composed: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)  # by overrides
    _said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, found: list[Space], common: list[str], args: argparse.Namespace) -> Tuning:
        """From the command line.

        Raises:
            ConfigError: for anything that could not be run.
        """
        if args.config_dir:
            common = [f"hydra.searchpath=[file://{Path(args.config_dir).expanduser().absolute()}]", *common]
        seeds = seeds_of(args.seeds, "--seeds")
        after = max(seeds) + 1
        final = tuple(range(after, after + 5))
        if args.final_seeds:
            final = seeds_of(args.final_seeds, "--final-seeds")
        overlap(seeds, final)
        sizes = [space.size for space in found if space.size is not None]
        if args.trials is None and not sizes:
            raise ConfigError("intervals have no number of points: type --trials N")
        trials = args.trials or min(sizes)
        request = cls(found, common, trials, seeds, final, args.sampler, args.extend, Path())
        first = [request.config(s, s.points(1)[0], seeds[0]) for s in found]
        request._validated(first)
        request.root = Path(first[0].out) / first[0].name
        if args.sampler == "grid":
            for space in found:
                for point in space.points(trials):
                    validate(request.config(space, point, seeds[0]))
        return request

    def _validated(self, configs: Sequence[DictConfig]) -> None:
        """See to validation data that trials can be chosen by."""
        for key, on in (("validation", "val"), ("client_validation", "clients_val")):
            needed = any(self.objective(config).on == on for config in configs)
            if needed and any(not config.evaluation[key] for config in configs):
                self.common.append(f"evaluation.{key}={SHARE}")
                print(
                    f"evaluation.{key}={SHARE}: set, since trials are chosen by validation data", flush=True
                )

    def objective(self, config: DictConfig) -> Objective:
        """What trials are chosen by: as the settings say, of validation data."""
        from fedsim.run.key import has_trait

        default = "clients_val" if has_trait(config, "personal") else "val"
        return Objective.of(plain(config), default).validation

    def config(self, space: Space, point: Point, seed: int) -> DictConfig:
        """The configuration of a run."""
        words = (*self.common, *space.overrides(point))
        if words not in self._composed:
            self._composed[words] = compose(words)
            if (line := limit_cohort(self._composed[words], words)) and line not in self._said:
                print(line, flush=True)
                self._said.add(line)
        config = deepcopy(self._composed[words])
        config.seed = seed
        return config

    def plan(self) -> dict[str, Any]:
        """What would be run, and what of it is done."""
        methods, there, total = [], 0, 0
        for space in self.spaces:
            known = self.sampler == "grid"
            points = space.points(self.trials) if known else []
            count = len(points) if known else self.trials
            runs = [self.config(space, point, seed) for point in points for seed in self.seeds]
            done = sum(finished(resolve(config)) is not None for config in runs)
            there, total = there + done, total + count * len(self.seeds) + len(self.final_seeds)
            methods.append(
                {
                    "name": space.method,
                    "grid": space.size,
                    "trials": [space.overrides(p) for p in points],
                    "done": done,
                }
            )
            print(f"{space.method}: {count} trials on {len(self.seeds)} seeds, {done} runs done", flush=True)
            for line in untried(space, points) if known else ():
                print(line, flush=True)
        print(f"{total} runs in all with the winners' on {len(self.final_seeds)} fresh seeds, {there} done")
        return {"schema": 1, "budget": self.trials, "methods": methods, "runs": total, "done": there}
