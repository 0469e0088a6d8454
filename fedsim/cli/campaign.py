"""The course of ``fedsim tune``: trials, steps beyond edges, winners on fresh seeds, and their comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.cli.exits import BAD_CONFIG, DONE, FAILED
from fedsim.cli.request import Tuning
from fedsim.cli.spaces import Edge, Point, Space
from fedsim.cli.sweep import JobResult
from fedsim.cli.trials import RECORD, GridSampler, OptunaSampler, Search, Trial, relative, value_of, write
from fedsim.config.check import validate
from fedsim.errors import ConfigError
from fedsim.run.key import version
from fedsim.run.provenance import scrubbed

Do = Callable[[DictConfig, JobResult], JobResult]


class Campaign:
    """The whole of it: trials, steps beyond edges, winners on fresh seeds."""

    def __init__(self, request: Tuning, do: Do) -> None:
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
            "common": scrubbed([w for w in request.common if not w.startswith(("hydra.", "out="))]),
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
            if score:  # test samples are looked at once, when the winners are compared
                config.tracker.console.shows = "validation"
            words = ",".join([*search.space.overrides(point), f"seed={seed}"])
            outcome = self._do(config, JobResult(job=self._number, overrides=words))
            self._number += 1
            self.codes.append(outcome.code if outcome.status == "failed" else DONE)
            if outcome.status == "failed":
                trial.scores[seed], trial.reason = None, outcome.reason
                continue
            trial.folders[seed] = relative(outcome.dir, self.request.root)
            if score:
                value, why, used = value_of(Path(outcome.dir), search.objective, config.rounds)
                search.used.add(used)
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
            inward = search.score_at(edge.key, edge.inside)
            way = "rising" if search.objective.sign > 0 else "falling"
            still = (
                f"score still {way} from {edge.inside}"
                if inward != winner.score
                else f"as good as {edge.inside}"
            )
            text += f" ({still})" if inward is not None else ""
        if edge.next is not None:
            text += f"; try {edge.next}" if self._possible(search, edge) else f"; {edge.next} is not possible"
        return text

    def _print(self, search: Search, budget: int) -> None:
        name, trials = search.space.method, len(search.trials)
        if search.exhausted:
            print(f"{name}: {trials} of {budget} trials, its grid is exhausted", flush=True)
        if search.unscored:
            print(
                f"{name}: {search.unscored} of {trials} trials failed or not finite, ranked last", flush=True
            )
        winner = search.winner
        if winner is None:
            print(f"{name}: no trial has a score; it has no winner", flush=True)
            return
        print(f"{_chosen(search)}; best of {trials} trials", flush=True)
        for warning in (*search.warnings, *search.untried):
            print(warning, flush=True)

    def _conclude(self) -> None:
        """The winners' runs compared on test data, seen here for the first time; settings and warnings once more."""
        finals = [search.final for search in self.searches if search.final is not None]
        folders = [self.request.root / folder for trial in finals for folder in trial.folders.values()]
        if folders:
            conclude(folders, self.request.root)
        for search in self.searches:
            chosen = [] if search.winner is None else [f"chosen: {_chosen(search)}"]
            for line in (*chosen, *search.warnings, *search.untried):
                print(line, flush=True)


def _chosen(search: Search) -> str:
    """``fedavg: client.lr=0.1, accuracy on val, mean of the last 10 evaluations: 0.9312``."""
    if search.winner is None:
        raise ValueError("there is no winner")
    settings = " ".join(search.space.overrides(search.winner.point))
    goal = search.objective.said(search.used)
    return f"{search.space.method}: {settings}, {goal}: {search.winner.score:.4f}"


def conclude(folders: Sequence[Path], root: Path) -> None:
    """Verdicts on the winners, then the table and the page of their runs."""
    from fedsim.cli.compare import compare
    from fedsim.cli.report import report

    words = [str(folder) for folder in folders]
    try:
        compare(words)
    except ConfigError as error:  # one method, or one whose numbers are of another kind
        print(error, flush=True)
    report([*words, "--out", str(root / "report")])
