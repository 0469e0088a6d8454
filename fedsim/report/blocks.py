"""The arms of one problem compared: with a reference, and for the mark of the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from fedsim.errors import ConfigError, hint
from fedsim.report.arms import Arm, Setting, settings_at_hand
from fedsim.report.objective import Objective, check_column
from fedsim.report.rightness import differing_samples
from fedsim.report.runs import Run
from fedsim.report.verdict import BETTER, EQUIVALENT, MOST, Comparison, bca, floor_of, judge, pair

MARGIN = 0.005  # of shares in 0..1; other metrics have none
ALL = "all"
MORE_TRAFFIC = 1.1  # from here on it is noted
WORK = ("client.epochs", "client.steps", "client.batch_size", "client.accumulate")


@dataclass(frozen=True)
class ComparisonPlan:
    """What is compared, and how."""

    objective: Objective = field(default_factory=Objective)
    reference: str = ""  # a method, or ``all`` pairs; empty: fedavg, else the first
    against: tuple[str, ...] = ()  # the methods compared with the reference; none named: every one
    margin: float | None = None  # None: ``MARGIN`` of shares, else none
    interval: str = "t"  # or bca
    population: bool = False  # over other test samples too, by ``predictions.npz`` of the runs

    @property
    def limit(self) -> float | None:
        """The margin in force."""
        return MARGIN if self.margin is None and self.objective.share else self.margin

    @property
    def scale(self) -> float:
        """Of numbers in words: shares are said in percent."""
        return 100.0 if self.objective.share else 1.0


@dataclass(frozen=True)
class ProblemBlock:
    """One problem: its arms, the comparisons with the reference, and the leaders."""

    setting: Setting
    reference: str
    comparisons: Sequence[Comparison]
    stars: Sequence[str]  # names of the best, if that is decided; several are equivalent
    undecided: str = ""  # why nothing is starred, if a leader is there

    @property
    def ranked(self) -> list[Arm]:
        """Arms that have the objective."""
        return ranked(self.setting.arms)


def blocks_of(
    runs: Sequence[Run], plan: ComparisonPlan, order: Sequence[str] = (), checked: bool = True
) -> list[ProblemBlock]:
    """Compare the runs, problem by problem.

    Raises:
        ConfigError: if no run has measured the objective, or a method that is named is not there.
    """
    if checked:
        check_column(plan.objective, [run.rows for run in runs])
    settings = [_ordered(setting, order) for setting in settings_at_hand(runs, plan.objective)]
    names = dict.fromkeys(name for s in settings for arm in s.arms for name in (arm.name, arm.group.method))
    for word in (*([plan.reference] if plan.reference not in ("", ALL) else []), *plan.against):
        if word not in names:
            raise ConfigError(
                f"no method {word!r} among the runs{hint(word, names)}; there are {'; '.join(names)}"
            )
    return [_block(setting, plan) for setting in settings]


def ranked(arms: Iterable[Arm]) -> list[Arm]:
    """Those that have numbers to compare."""
    return [arm for arm in arms if arm.numbers and not arm.unranked]


def _ordered(setting: Setting, order: Sequence[str]) -> Setting:
    """Arms as named in ``order``, by method or by name; others after them."""
    places = {name: at for at, name in enumerate(order)}
    last = len(places)

    def place(arm: Arm) -> int:
        return min(places.get(arm.name, last), places.get(arm.group.method, last))

    return replace(setting, arms=sorted(setting.arms, key=place))


def _block(setting: Setting, plan: ComparisonPlan) -> ProblemBlock:
    arms = ranked(setting.arms)
    reference = _reference(arms, plan)
    if plan.reference == ALL:
        pairs = [(a, b) for at, b in enumerate(arms) for a in arms[at + 1 :]]
    else:
        pairs = [
            (arm, reference)
            for arm in arms
            if reference is not None
            and arm is not reference
            and (not plan.against or {arm.name, arm.group.method} & set(plan.against))
        ]
    stars, undecided = leaders(arms, plan)
    name = "" if reference is None else reference.name
    return ProblemBlock(
        setting, ALL if plan.reference == ALL else name, compared(pairs, plan), stars, undecided
    )


def _reference(arms: Sequence[Arm], plan: ComparisonPlan) -> Arm | None:
    for wanted in filter(None, (plan.reference, "fedavg")):
        exact = [arm for arm in arms if arm.name == wanted]
        fitting = exact or [arm for arm in arms if arm.group.method == wanted]
        if len(fitting) > 1 and wanted == plan.reference:
            listed = "; ".join(arm.name for arm in fitting)
            raise ConfigError(f"--reference {wanted}: several arms are of that method; type one of: {listed}")
        if fitting:
            return fitting[0]
    return arms[0] if arms else None


def compared(pairs: Sequence[tuple[Arm, Arm]], plan: ComparisonPlan, noted: bool = True) -> list[Comparison]:
    """The pairs (a, b) as one family; ``noted`` with what else differs between them."""
    interval = bca if plan.interval == "bca" else None
    sign = plan.objective.sign
    family = [
        pair(
            (a.name, a.values),
            (b.name, b.values),
            sign=sign,
            margin=plan.limit,
            floor=_floor(a, b, plan),
            interval=interval,
            samples=differing_samples(a, b) if plan.population else None,
        )
        for a, b in pairs
    ]
    if noted:
        family = [
            replace(c, notes=(*c.notes, *differences(a, b, c.seeds)))
            for c, (a, b) in zip(family, pairs, strict=True)
        ]
    return judge(family, [_identical(a, b) for a, b in pairs], plan.scale)


def _floor(a: Arm, b: Arm, plan: ComparisonPlan) -> float:
    """Of accuracies over one test or validation set, whose size is known."""
    name = {"test": "test_samples", "val": "validation_samples"}.get(plan.objective.on, "")
    if not plan.objective.share or not name:
        return 0.0
    sizes = [run.summary[name] for arm in (a, b) for run in arm.runs.values() if run.summary.get(name)]
    counts = [len(number.rounds) for arm in (a, b) for number in arm.numbers.values() if number.rounds]
    return floor_of(min(sizes), min(counts)) if sizes and counts else 0.0


def _identical(a: Arm, b: Arm) -> bool:
    seeds = a.runs.keys() & b.runs.keys()
    ends = [[arm.runs[seed].rows[-1:] for arm in (a, b)] for seed in seeds]
    last = [[row.get("weights_hash") for rows in both for row in rows] for both in ends if all(both)]
    return bool(last) and all(one is not None and one == other for one, other in last)


def differences(a: Arm, b: Arm, seeds: Sequence[int]) -> list[str]:
    """What else differs between two arms that are compared, in words: cohorts, work, traffic, machines."""
    out, first = [], dict[int, list[int]]()
    for seed in seeds:
        rows = zip(a.runs[seed].rows, b.runs[seed].rows, strict=False)
        at = next((x["round"] for x, y in rows if x.get("cohort") != y.get("cohort")), None)
        if at is not None:
            first.setdefault(int(at), []).append(seed)
    if first:
        differing = sorted(seed for found in first.values() for seed in found)
        out.append(
            f"cohorts differ from round {min(first)} (seed{'s' * (len(differing) > 1)} {_list(differing)})"
        )
    one, other = (dict(arm.group.flat) for arm in (a, b))
    for key in (*WORK, "evaluation.every"):
        if key in one and key in other and one[key] != other[key]:
            out.append(f"{key} {one[key]} against {other[key]}")
    traffic = [_traffic(arm) for arm in (a, b)]
    if min(traffic) > 0 and max(traffic) / min(traffic) > MORE_TRAFFIC:
        out.append(f"{traffic[0] / traffic[1]:.2g} times the traffic per round")
    facts = [[arm.runs[s].facts for s in seeds] for arm in (a, b)]
    for key, words in (
        ("initial_hash", "initial weights differ"),
        ("uploads_hash", "one-shot methods began with other models of the clients"),
        ("host.class", "computed on different machines"),
    ):
        values = [[fact.get(key) for fact in found] for found in facts]
        if any(x is not None and y is not None and x != y for x, y in zip(*values, strict=True)):
            out.append(words)
    return out


def _traffic(arm: Arm) -> float:
    runs = [run for run in arm.runs.values() if run.rows]
    return (
        fmean((run.total("bytes_up") + run.total("bytes_down")) / len(run.rows) for run in runs)
        if runs
        else 0.0
    )


def leaders(arms: Sequence[Arm], plan: ComparisonPlan) -> tuple[list[str], str]:
    """Who is better than, or leads and is equivalent to, every other; else why nobody is."""
    means = {
        arm.name: plan.objective.sign * fmean(finite)
        for arm in arms
        if (finite := [v for v in arm.values.values() if math.isfinite(v)])
    }
    if len(arms) < 2 or not means:
        return [], ""
    lead = max(means, key=means.__getitem__)
    by_name = {arm.name: arm for arm in arms}
    found = _against_all(by_name[lead], arms, plan)
    if open_ := [c for c in found if c.verdict not in (BETTER, EQUIVALENT)]:
        known = [c.seeds_needed for c in open_ if c.seeds_needed]
        seeds = f"; {said_seeds(max(known))} would decide" if known else ""
        others = " and ".join(c.b for c in open_[:3]) + " ..." * (len(open_) > 3)
        family = f" (Holm over its {len(found)} comparisons)" if len(found) > 1 else ""
        return [], f"{lead} leads, undecided against {others}{family}{seeds}"
    ties = [c.b for c in found if c.verdict == EQUIVALENT]
    if len(ties) == len(found):
        return [], ""
    tied = [
        name
        for name in ties
        if all(c.verdict in (BETTER, EQUIVALENT) for c in _against_all(by_name[name], arms, plan))
    ]
    return [lead, *tied], ""


def _against_all(arm: Arm, arms: Sequence[Arm], plan: ComparisonPlan) -> list[Comparison]:
    return compared([(arm, other) for other in arms if other is not arm], replace(plan, interval="t"), False)


def said_seeds(count: int) -> str:
    """``about 16 seeds``."""
    return f"> {MOST} seeds" if count > MOST else f"about {count} seeds"


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
