"""Runs put side by side: those of one problem in one block, those of one method and its settings in one arm of it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsim.config.roles import role_of
from fedsim.report.objective import Number, Objective
from fedsim.report.runs import Group, Run, as_key, followers_of, group_runs

# Settings of the problem's role that say how often and how much is measured, not what is learned
READING = frozenset(
    f"evaluation.{name}"
    for name in ("every", "clients_every", "batch_size", "by_class", "local_unseen", "target")
)
HASHES = ("partition_hash", "data_hash")  # that must agree on each seed


@dataclass(frozen=True)
class Arm:
    """A method with its settings, in one block."""

    name: str
    group: Group
    runs: Mapping[int, Run]  # finished, by seed
    numbers: Mapping[int, Number]  # of these
    excluded: Sequence[tuple[int, str]]  # seeds that are not finished, and why
    unranked: str = ""  # why it takes no part in comparisons by this objective
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> dict[int, float]:
        """The number of each finished run by seed; NaN where it is not finite."""
        return {seed: number.value for seed, number in self.numbers.items()}


@dataclass(frozen=True)
class Setting:
    """Arms that stand in one comparison."""

    problem: Mapping[str, Any]  # its settings, dotted
    arms: Sequence[Arm]
    differing: Mapping[str, Any] = field(default_factory=dict)  # what tells it from the other ones at hand

    @property
    def hash(self) -> str:
        """16 hex digits of its settings."""
        text = json.dumps(self.problem, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings_at_hand(runs: Sequence[Run], objective: Objective) -> list[Setting]:
    """The problems among the runs, in order of their differing settings, each with its methods."""
    flat = [run.settings for run in runs]
    followers = followers_of(runs, flat)
    problems = [
        {k: v for k, v in one.items() if role_of(k) == "problem" and k not in followers and k not in READING}
        for one in flat
    ]
    members: dict[str, list[int]] = {}
    for at, problem in enumerate(problems):
        members.setdefault(as_key(problem), []).append(at)
    found = [
        (problems[indices[0]], groups)
        for indices in members.values()
        for groups in _compatible(group_runs([runs[at] for at in indices]))
    ]
    keys = dict.fromkeys(key for problem, _ in found for key in problem)
    differing = [k for k in keys if len({as_key(p.get(k)) for p, _ in found}) > 1]
    out = [
        Setting(
            problem,
            _distinguished([_arm(group, objective) for group in groups]),
            {k: problem[k] for k in differing if k in problem},
        )
        for problem, groups in found
    ]
    return sorted(out, key=lambda setting: [_sortable(v) for v in setting.differing.values()])


def _distinguished(arms: Sequence[Arm]) -> list[Arm]:
    """Arms whose names differ: settings that look alike when they are rounded get a number."""
    seen, out = Counter[str](), []
    for arm in arms:
        seen[arm.name] += 1
        out.append(arm if seen[arm.name] == 1 else replace(arm, name=f"{arm.name} ({seen[arm.name]})"))
    return out


def _compatible(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups whose runs of one seed had the same samples, as far as their hashes are known."""
    out: list[tuple[list[Group], dict[tuple[int, str], str]]] = []
    for group in groups:
        known = {
            (run.seed, name): value
            for run in group.runs
            for name, value in run.facts.items()
            if name in HASHES
        }
        for together, hashes in out:
            if all(hashes.get(key, value) == value for key, value in known.items()):
                together.append(group)
                hashes |= known
                break
        else:
            out.append(([group], known))
    return [together for together, _ in out]


def _arm(group: Group, objective: Objective) -> Arm:
    done = {run.seed: run for run in group.runs if run.status == "done"}
    excluded = [
        (run.seed, f"{run.status} after {len(run.rows)} rounds") for run in group.runs if run.status != "done"
    ]
    numbers = {seed: objective.number(run.rows) for seed, run in done.items()}
    missing = next((number.missing for number in numbers.values() if number.missing), "")
    if any(run.summary.get("personal") for run in group.runs) and objective.on in ("test", "val"):
        own = "clients" if objective.on == "test" else "clients_val"
        missing = f"its models are the clients' own; compare it by {own}/{objective.metric}"
    notes = []
    if any((run.config.get("objective") or {}).get("on") == "test" for run in group.runs):
        notes.append("tuned on test")
    if len({len(number.rounds) for number in numbers.values()}) > 1:
        counts = sorted({len(number.rounds) for number in numbers.values()})
        notes.append(f"means of {' and '.join(map(str, counts))} evaluations")
    return Arm(group.label, group, done, numbers, excluded, missing, tuple(notes))


def relative(folder: Path, roots: Sequence[Path]) -> str:
    """A run's folder as seen from beside the folder on the command line that holds it: the same from everywhere."""
    absolute = folder.resolve()
    base = next((base for root in roots if absolute.is_relative_to(base := root.resolve())), absolute)
    return (Path(base.name) / absolute.relative_to(base)).as_posix()


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not number, float(value) if number else 0.0, str(value))
