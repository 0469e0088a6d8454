"""Values of clients: what each contributes to what a run achieves, from runs in which only some of them are there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from fedsim.config.textfile import read_text
from fedsim.errors import ConfigError
from fedsim.replay import kernelshap, valuation
from fedsim.replay.sampled import sampled
from fedsim.replay.valuation import Coalition, Order
from fedsim.replay.variants import BaseRun, compute, existing, rows_in
from fedsim.report.objective import Objective
from fedsim.report.verdict import Comparison, judge, pair

KINDS = ("loo", "shapley", "banzhaf")
MARGIN = 0.005  # of shares, such as accuracies: half a point


@dataclass(frozen=True)
class Players:
    """Who is valued: names, and the clients of each. Clients of no player are always there."""

    names: tuple[str, ...]
    members: tuple[frozenset[int], ...]

    def __len__(self) -> int:
        return len(self.names)

    def absent(self, coalition: Coalition) -> frozenset[int]:
        """The clients that are not there when only the players of ``coalition`` are."""
        gone = [members for at, members in enumerate(self.members) if at not in coalition]
        return frozenset().union(*gone)


def players_of(base: BaseRun, named: str | None) -> Players:
    """Each client; ``domain``: the clients of each domain; else a JSON file ``{"name": [ids], ...}``.

    Raises:
        ConfigError: for groups that overlap, are empty, or name clients that are not there.
    """
    if named is None:
        return Players(tuple(map(str, base.clients)), tuple(frozenset([c]) for c in base.clients))
    groups = _domains(base) if named == "domain" else _of_file(named)
    there, seen = set(base.clients), set[int]()
    for name, ids in groups.items():
        if not ids or set(ids) & seen or not set(ids) <= there:
            raise ConfigError(
                f"--players {named}: {name}={sorted(ids)}: players are groups of at least one client of "
                f"{min(there)} to {max(there)}, and no client is in two"
            )
        seen |= set(ids)
    return Players(tuple(groups), tuple(map(frozenset, groups.values())))


def _of_file(path: str) -> dict[str, list[int]]:
    try:
        found = json.loads(read_text(Path(path)))
        return {str(name): [int(c) for c in ids] for name, ids in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'--players {path}: domain, or a JSON file like {{"north": [0, 1], "south": [2]}} ({error})'
        ) from error


def _domains(base: BaseRun) -> dict[str, list[int]]:
    from fedsim.run.given import Given
    from fedsim.run.participants import strategy
    from fedsim.run.preparation import load_data

    names = load_data(base.config, Given(), strategy(base.config, None)).domain_names
    groups: dict[str, list[int]] = {}
    for client in base.clients:
        if names is not None and (name := names[client]) is not None:
            groups.setdefault(name, []).append(client)
    if len(groups) < 2:
        raise ConfigError("--players domain: the clients of this run are not of several domains")
    return groups


@dataclass(frozen=True)
class Valuing:
    """What is to be found out, and by which runs."""

    base: BaseRun
    kind: str
    players: Players
    objective: Objective
    seeds: tuple[int, ...]
    orders: tuple[Order, ...] = ()  # in which players join; none: all coalitions
    weights: Mapping[Coalition, float] = field(
        default_factory=dict
    )  # of coalitions, for least squares; none: all
    margin: float | None = None

    @cached_property
    def coalitions(self) -> list[Coalition]:
        """Those whose runs are needed, the large ones first; the empty one needs no run."""
        n = len(self.players)
        everybody = frozenset(range(n))
        if self.kind == "loo":
            return [everybody, *(c for k in range(n) if (c := everybody - {k}))]
        found = (
            set(self.weights) or valuation.met_by(self.orders) or set(valuation.coalitions(n)) - {frozenset()}
        )
        return sorted(found | {everybody}, key=lambda c: (-len(c), sorted(c)))

    @cached_property
    def runs(self) -> dict[tuple[int, Coalition], DictConfig]:
        """The run of each seed and coalition. Two with the same cohorts in every round are the same run."""
        found: dict[tuple[int, Coalition], DictConfig] = {}
        alike = not self.objective.on.startswith("clients") and not self.base.config.client.get("classes")
        for seed in self.seeds:
            known: dict[Any, DictConfig] = {}
            for coalition in self.coalitions:
                gone = self.players.absent(coalition)
                drawn = self.base.cohorts(gone, seed) if alike else None
                if drawn is None or drawn not in known:
                    config = self.base.without(gone, seed=seed)
                    if drawn is not None:
                        known[drawn] = config
                else:
                    config = known[drawn]
                found[seed, coalition] = config
        return found

    @property
    def distinct(self) -> list[DictConfig]:
        """The runs, each once."""
        return list({str(config.dir): config for config in self.runs.values()}.values())

    def costs(self) -> dict[str, Any]:
        """How many runs that is, how many are there, and an estimate in seconds from the base run's."""
        todo = sum(existing(config) is None for config in self.distinct)
        each = float(self.base.summary.get("seconds") or 0)
        coalitions = len(self.coalitions) * len(self.seeds)
        return {
            "coalitions": coalitions,
            "runs": len(self.distinct),
            "done": len(self.distinct) - todo,
            "todo": todo,
            "seconds": round(todo * each, 1),
        }

    def utilities(self, seed: int) -> dict[Coalition, float]:
        """What each coalition achieves under a seed; more is better.

        Raises:
            ConfigError: if that was not measured, or is not finite.
        """
        found = {}
        for coalition in self.coalitions:
            folder = Path(self.runs[seed, coalition].dir)
            found[coalition] = self._finite(self.objective.number(rows_in(folder)), str(folder))
        if self.kind != "loo" or len(self.players) == 1:
            from fedsim.replay.untrained import untrained

            row = untrained(self.base.variant(seed=seed))
            found[frozenset()] = self._finite(self.objective.number([row]), "the initial model")
        return found

    def _finite(self, number: Any, what: str) -> float:
        if not math.isfinite(number.value):
            why = number.missing or "is not finite"
            more = "; type --objective accuracy to value clients by the test set knowingly"
            raise ConfigError(f"{what}: {why}{more if self.objective.on.endswith('val') else ''}")
        return self.objective.sign * float(number.value)

    def values(self, utilities: Mapping[Coalition, float]) -> np.ndarray:
        """Of each player (n,)."""
        v, n = utilities.__getitem__, len(self.players)
        if self.kind == "loo":
            return valuation.leave_one_out(v, n)
        if self.weights:
            return kernelshap.shapley_by_kernel(v, n, self.weights)
        if self.orders:
            by = {"shapley": valuation.shapley_by_orders, "banzhaf": valuation.banzhaf_by_orders}
            return by[self.kind](v, self.orders)
        return {"shapley": valuation.shapley, "banzhaf": valuation.banzhaf}[self.kind](v, n)


def plan(
    folder: Path,
    kind: str = "loo",
    *,
    objective: Objective | None = None,
    players: str | None = None,
    seeds: Sequence[int] = (),
    runs: int | None = None,
    margin: float | None = None,
    kernel: bool = False,
) -> Valuing:
    """What it takes to value the clients of the finished run in ``folder``.

    Args:
        folder: of the run in which all are there.
        kind: loo, shapley or banzhaf.
        objective: what a run is worth; default: accuracy on validation samples.
        players: see :func:`players_of`.
        seeds: default: the run's own. From three on there are verdicts.
        runs: coalitions at most, by antithetic permutations; needed beyond 8 players.
        kernel: by least squares over the coalitions instead (Shapley values alone).
        margin: values within which a player makes no difference; default: half a point of a share.

    Raises:
        ConfigError: if that cannot be computed, or nothing is measured that it goes by.
    """
    base = BaseRun.of(folder)
    goal = objective or Objective.of(base.config, "val")
    if not any(row.get(goal.column) is not None for row in base.rows):
        where = " (run it with evaluation.validation=0.1)" if goal.on == "val" else ""
        raise ConfigError(
            f"{folder}: {goal.column} was not measured{where}; or type --objective, such as --objective accuracy to "
            "value clients by the test set knowingly"
        )
    who = players_of(base, players)
    if len(who) < 2:
        raise ConfigError(f"{folder}: there is one player only; give at least two")
    orders, weights = sampled(kind, len(who), runs, kernel, int(base.config.seed))
    near = MARGIN if margin is None and goal.share else margin
    own = tuple(seeds) or (int(base.config.seed),)
    return Valuing(base, kind, who, goal, own, orders, weights, near)


def find(todo: Valuing, workers: int = 1, say: Any = print) -> dict[str, Any]:
    """Compute the runs that are missing, then the values; as ``fedsim value --json`` prints them."""
    costs = todo.costs()
    compute(todo.distinct, workers, say)
    by_seed = {seed: todo.utilities(seed) for seed in todo.seeds}
    values = {seed: todo.values(utilities) for seed, utilities in by_seed.items()}
    compared = verdicts(todo, values)
    empty, everybody = Coalition(), frozenset(range(len(todo.players)))
    return {
        "run": str(todo.base.dir),
        "kind": todo.kind,
        "objective": todo.objective.said([len(todo.objective.number(todo.base.rows).rounds)]),
        "seeds": list(todo.seeds),
        "exact": not todo.orders and (not todo.weights or len(todo.weights) == 2 ** len(todo.players) - 1),
        "runs": costs,
        "all": {str(s): u[everybody] for s, u in by_seed.items()},
        "nobody": {str(s): u[empty] for s, u in by_seed.items() if empty in u},
        "players": [
            {
                "name": name,
                "clients": sorted(todo.players.members[at]),
                "value": float(np.mean([values[s][at] for s in todo.seeds])),
                "by_seed": {str(s): float(values[s][at]) for s in todo.seeds},
                "low": _number(c.low),
                "high": _number(c.high),
                "p": _number(c.p_holm),
                "verdict": c.verdict if len(todo.seeds) > 1 else None,
            }
            for at, (name, c) in enumerate(zip(todo.players.names, compared, strict=True))
        ],
    }


def verdicts(todo: Valuing, values: Mapping[int, np.ndarray]) -> list[Comparison]:
    """Of each player whether it is there for the better: paired over seeds, Holm over players."""
    nothing = dict.fromkeys(todo.seeds, 0.0)
    return judge(
        [
            pair((name, {s: float(values[s][at]) for s in todo.seeds}), ("", nothing), margin=todo.margin)
            for at, name in enumerate(todo.players.names)
        ]
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
