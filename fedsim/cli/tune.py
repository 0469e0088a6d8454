"""``fedsim tune``: equal budgets for all methods on validation data, winners on fresh seeds, one comparison at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.cli.arguments import Arguments
from fedsim.cli.exits import BAD_CONFIG, DONE, FAILED
from fedsim.cli.spaces import Edge, Point, Space, spaces
from fedsim.cli.sweep import JobResult
from fedsim.cli.trials import RECORD, SAMPLERS, GridSampler, OptunaSampler, Search, Trial
from fedsim.cli.trials import overlap, relative, seeds_of, text_of, value_of, write
from fedsim.config.check import validate
from fedsim.config.compose import compose, plain
from fedsim.errors import ConfigError
from fedsim.report.objective import Objective
from fedsim.run.key import finished, version
from fedsim.run.resolve import resolve

Do = Callable[[DictConfig, JobResult], JobResult]
SHARE = 0.1  # of the training samples, for choosing, where nothing is said


def tune(argv: Sequence[str]) -> int:
    """Choose settings of methods by validation data, each with the same number of trials; compare the winners."""
    args = _parsed(argv)
    found, common = spaces([word for word in args.settings if not word.startswith("-")])
    with _quiet(args.json):
        request = Request.of(found, common, args)
        if args.dry_run:
            facts, code = request.plan(), DONE
        else:
            from fedsim.cli.launch import jobs

            with jobs() as do:
                facts, code = Campaign(request, do).run()
    if args.json:
        print(text_of(facts), end="", flush=True)
    return code


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Arguments(prog="fedsim tune", description=tune.__doc__)
    parser.add_argument("settings", nargs="*", metavar="[METHOD:]KEY=VALUES", help="as in a sweep; METHOD: its own")
    parser.add_argument("--trials", type=int, metavar="N", help="of each method; default: the smallest grid")
    parser.add_argument("--seeds", default="0", help="that trials are run on, as in 0,1 or 0-4; default: 0")
    parser.add_argument("--final-seeds", help="that winners are run on; default: the five after --seeds")
    parser.add_argument("--sampler", choices=SAMPLERS, default="grid", help="default: grid")
    parser.add_argument(
        "--extend", type=int, default=0, metavar="N", help="go up to N steps beyond the edges of the grid"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with options of your own")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and stop")
    parser.add_argument("--json", action="store_true", help=f"print what {RECORD} holds, and nothing else")
    args = parser.parse_intermixed_args(list(argv))
    for name in ("trials", "extend"):
        least = 1 if name == "trials" else 0
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least {least}")
    for word in args.settings:
        if word.partition("=")[0].lstrip("+") in ("seed", "dir"):
            raise ConfigError(f"{word}: type --seeds and --final-seeds, or out= and name=, instead")
    return args


@contextmanager
def _quiet(on: bool) -> Iterator[None]:
    """With ``--json``, whatever runs print goes to stderr."""
    if not on:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


@dataclass
class Request:
    """What is asked for, checked before anything is run."""

    spaces: list[Space]
    common: list[str]
    trials: int
    seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    sampler: str
    extend: int
    root: Path  # folder of the runs

    @classmethod
    def of(cls, found: list[Space], common: list[str], args: argparse.Namespace) -> Request:
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
                print(f"evaluation.{key}={SHARE}: set, since trials are chosen by validation data", flush=True)

    def objective(self, config: DictConfig) -> Objective:
        """What trials are chosen by: as the settings say, of validation data."""
        from fedsim.run.key import has_trait

        default = "clients_val" if has_trait(config, "personal") else "val"
        return Objective.of(plain(config), default).validation

    def config(self, space: Space, point: Point, seed: int) -> DictConfig:
        """The configuration of a run."""
        words = tuple([*self.common, *space.overrides(point)])
        if getattr(self, "_last", (None, None))[0] != words:  # the seeds of one point come one after the other
            self._last: tuple[Any, Any] = (words, compose(words))
        config: DictConfig = deepcopy(self._last[1])
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
                {"name": space.method, "grid": space.size, "trials": [space.overrides(p) for p in points], "done": done}
            )
            print(f"{space.method}: {count} trials on {len(self.seeds)} seeds, {done} runs done", flush=True)
        print(f"{total} runs in all with the winners' on {len(self.final_seeds)} fresh seeds, {there} done")
        return {"schema": 1, "budget": self.trials, "methods": methods, "runs": total, "done": there}


class Campaign:
    """The whole of it: trials, steps beyond edges, winners on fresh seeds."""

    def __init__(self, request: Request, do: Do) -> None:
        self.request, self._do, self._number = request, do, 0
        self.codes: list[int] = []  # of runs: 0 of those that are done
        self.searches = [self._search(space) for space in request.spaces]

    def _search(self, space: Space) -> Search:
        request = self.request
        first = request.config(space, space.points(1)[0], request.seeds[0])
        objective = request.objective(first)
        if request.sampler == "optuna":
            return Search(space, OptunaSampler(space, objective.sign), objective)
        return Search(space, GridSampler(space, request.trials), objective)

    def run(self) -> tuple[dict[str, Any], int]:
        """Everything that is not done yet; the record, and the exit code."""
        request, path = self.request, self.request.root / RECORD
        for search in self.searches:
            self._more(search, request.trials)
        budget = request.trials
        for _ in range(request.extend):
            beyond = [self._beyond(search) for search in self.searches]
            if not (count := max(map(len, beyond))):
                break
            budget += count
            for search, points in zip(self.searches, beyond, strict=True):
                for point in points:
                    search.trials.append(self._trial(search, point, request.seeds))
                self._more(search, budget)
        for search in self.searches:
            search.warnings = [self._said(search, edge) for edge in search.at_edges()]
            self._print(search, budget)
        for search in self.searches:
            if search.winner is not None:
                search.final = self._trial(search, search.winner.point, request.final_seeds, score=False)
        facts = {
            "schema": 1,
            "fedsim": version(),
            "common": request.common,
            "sampler": request.sampler,
            "budget": budget,
            "seeds": list(request.seeds),
            "final_seeds": list(request.final_seeds),
            "methods": [search.facts(budget) for search in self.searches],
        }
        write(path, facts)
        self._conclude()
        print(f"record:  {path}", flush=True)
        failed = [code for code in self.codes if code]
        bad = len(failed) == len(self.codes) and set(failed) == {BAD_CONFIG}
        return facts, DONE if not failed else BAD_CONFIG if bad else FAILED

    def _more(self, search: Search, upto: int) -> None:
        """Trials until there are ``upto``, or none is left to try."""
        while len(search.trials) < upto:
            if (point := search.sampler.next()) is None:
                search.exhausted = True
                return
            trial = self._trial(search, point, self.request.seeds)
            search.trials.append(trial)
            search.sampler.tell(trial.score)

    def _trial(self, search: Search, point: Point, seeds: Sequence[int], score: bool = True) -> Trial:
        """Run a point on ``seeds``; what each run is worth, if that is asked for."""
        trial = Trial(point)
        for seed in seeds:
            config = self.request.config(search.space, point, seed)
            words = ",".join([*search.space.overrides(point), f"seed={seed}"])
            outcome = self._do(config, JobResult(job=self._number, overrides=words))
            self._number += 1
            self.codes.append(outcome.code if outcome.status == "failed" else DONE)
            if outcome.status == "failed":
                trial.scores[seed], trial.reason = None, outcome.reason
                continue
            trial.folders[seed] = relative(outcome.dir, self.request.root)
            if score:
                value, why = value_of(Path(outcome.dir), search.objective, config.rounds)
                trial.scores[seed], trial.reason = value, trial.reason or why
        return trial

    def _beyond(self, search: Search) -> list[Point]:
        """The winner with each setting at an edge one step further out, where such a run is possible."""
        winner, found = search.winner, []
        for edge in search.at_edges():
            assert winner is not None
            if edge.next is not None and self._possible(search, edge):
                found.append(self._moved(search, edge))
        return [point for point in found if all(t.point != point for t in search.trials)]

    def _moved(self, search: Search, edge: Edge) -> Point:
        assert search.winner is not None and edge.next is not None
        axes = zip(search.space.axes, search.winner.point, strict=True)
        return tuple(edge.next if axis.key == edge.key else value for axis, value in axes)

    def _possible(self, search: Search, edge: Edge) -> bool:
        try:
            validate(self.request.config(search.space, self._moved(search, edge), self.request.seeds[0]))
        except ConfigError:
            return False
        return True

    def _said(self, search: Search, edge: Edge) -> str:
        """``fedspeed: client.lr=0.1 is the largest tried (score still rising from 0.03); try 0.3``."""
        text, winner = str(edge), search.winner
        if edge.inside is not None and winner is not None:
            beside = search.beside(edge.key, edge.inside)
            way = "rising" if search.objective.sign > 0 else "falling"
            still = f"score still {way} from {edge.inside}" if beside != winner.score else f"as good as {edge.inside}"
            text += f" ({still})" if beside is not None else ""
        if edge.next is not None:
            text += f"; try {edge.next}" if self._possible(search, edge) else f"; {edge.next} is not possible"
        return text

    def _print(self, search: Search, budget: int) -> None:
        name, trials = search.space.method, len(search.trials)
        if search.exhausted:
            print(f"{name}: {trials} of {budget} trials, its grid is exhausted", flush=True)
        if search.unscored:
            print(f"{name}: {search.unscored} of {trials} trials failed or not finite, ranked last", flush=True)
        winner = search.winner
        if winner is None:
            print(f"{name}: no trial has a score; it has no winner", flush=True)
            return
        settings = " ".join(search.space.overrides(winner.point))
        print(f"{name}: {settings}, {search.objective}: {winner.score:.4f}; best of {trials} trials", flush=True)
        for warning in search.warnings:
            print(warning, flush=True)

    def _conclude(self) -> None:
        """The winners' runs compared on test data, seen here for the first time; the warnings once more."""
        finals = [search.final for search in self.searches if search.final is not None]
        folders = [self.request.root / folder for trial in finals for folder in trial.folders.values()]
        if folders:
            conclude(folders, self.request.root)
        for search in self.searches:
            for warning in search.warnings:
                print(warning, flush=True)


def conclude(folders: Sequence[Path], root: Path) -> None:
    """The one place where winners are compared: table and page of their runs."""
    from fedsim.cli.report import report

    report([*map(str, folders), "--out", str(root / "report")])
