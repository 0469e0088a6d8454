"""Comparisons as a JSON document (``comparison.schema.json``) and as lines of text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedsim.report.arms import Arm, relative
from fedsim.report.blocks import ALL, ComparisonPlan, ProblemBlock, said_seeds
from fedsim.report.runs import short_names, short_value
from fedsim.report.verdict import EQUIVALENT, LEVEL, UNDECIDED, Comparison

SCHEMA = "comparison.schema.json"


def document(
    blocks: Sequence[ProblemBlock],
    plan: ComparisonPlan,
    command: Sequence[str],
    roots: Sequence[Path],
    version: str,
) -> dict[str, Any]:
    """All of a comparison, numbers as measured: what is not finite is None. The same runs give the same document."""
    objective = plan.objective
    return {
        "schema": 1,
        "fedsim": version,
        "command": list(command),
        "objective": {
            "metric": objective.metric,
            "on": objective.on,
            "at": objective.at,
            "direction": "max" if objective.sign > 0 else "min",
            "clients": objective.clients,
            "k": max(
                (len(n.rounds) for b in blocks for a in b.setting.arms for n in a.numbers.values()), default=0
            ),
        },
        "margin": plan.limit,
        "alpha": LEVEL,
        "adjust": "holm",
        "blocks": [_block(block, roots) for block in blocks],
    }


def to_text(content: dict[str, Any]) -> str:
    """The document as it is written: sorted keys, no dates, the same bytes for the same runs."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False, default=str) + "\n"


def schema() -> dict[str, Any]:
    """The JSON schema of :func:`document`."""
    found: dict[str, Any] = json.loads(files("fedsim.report").joinpath(SCHEMA).read_text(encoding="utf-8"))
    return found


def _block(block: ProblemBlock, roots: Sequence[Path]) -> dict[str, Any]:
    return {
        "problem": {key: _plain(value) for key, value in block.setting.problem.items()},
        "problem_hash": block.setting.hash,
        "reference": block.reference or None,
        "methods": [_method(arm, roots) for arm in block.setting.arms],
        "comparisons": [_comparison(c) for c in block.comparisons],
        "stars": list(block.stars),
    }


def _method(arm: Arm, roots: Sequence[Path]) -> dict[str, Any]:
    values = arm.values
    finite = [value for value in values.values() if math.isfinite(value)]
    notes = list(arm.notes) + ([f"not ranked: {arm.unranked}"] if arm.unranked else [])
    if lost := [seed for seed, value in values.items() if not math.isfinite(value)]:
        notes.append(f"not finite: {len(lost)} of {len(values)} seeds ({', '.join(map(str, lost))})")
    return {
        "name": arm.name,
        "settings": {key: _plain(value) for key, value in arm.group.settings.items()},
        "n": len(finite),
        "seeds": sorted(values),
        "values": {str(seed): _number(value) for seed, value in values.items()},
        "mean": fmean(finite) if finite else None,
        "sd": stdev(finite) if len(finite) > 1 else None,
        "runs": [relative(arm.runs[seed].dir, roots) for seed in sorted(arm.runs)],
        "excluded": [{"seed": seed, "reason": reason} for seed, reason in sorted(arm.excluded)],
        "notes": notes,
    }


def _comparison(c: Comparison) -> dict[str, Any]:
    numbers = ("mean", "sd", "low", "high", "p", "p_holm", "p_flip")
    return {
        "a": c.a,
        "b": c.b,
        "seeds": list(c.seeds),
        "n": c.n,
        **{name: _number(getattr(c, name)) for name in numbers},
        "verdict": c.verdict,
        "reason": c.reason,
        "seeds_needed": c.seeds_needed,
        "notes": list(c.notes),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return _number(value)
    return value if value is None or isinstance(value, str | int | bool | list) else str(value)


def lines(blocks: Sequence[ProblemBlock], plan: ComparisonPlan) -> list[str]:
    """The comparisons in words, block by block."""
    out: list[str] = []
    for at, block in enumerate(blocks):
        out += [""] * (at > 0) + _lines(block, plan, len(blocks))
    return out


def differing_words(block: ProblemBlock) -> str:
    """``alpha=0.3, num_clients=20``."""
    differing = block.setting.differing
    names = short_names(differing)
    return (
        ", ".join(f"{names[key]}={short_value(key, value)}" for key, value in differing.items())
        or "other samples"
    )


def problem_words(block: ProblemBlock, blocks: int) -> str:
    """What tells the block from others: ``alpha=0.3, 40 rounds``."""
    differing = block.setting.differing if blocks > 1 else {}
    reasons = [differing_words(block)] if differing else []
    problem = block.setting.problem
    data = short_value("data._target_", problem.get("data._target_") or problem.get("data.given") or "")
    kept = [data] if data and "data._target_" not in differing else []
    rounds = [f"{problem['rounds']} rounds"] if "rounds" in problem and "rounds" not in differing else []
    return ", ".join([*kept, *reasons, *rounds])


def objective_words(blocks: Sequence[ProblemBlock], plan: ComparisonPlan) -> str:
    """The objective with the number of evaluations that it is made of: ``accuracy on test, mean of the last 3 ...``."""
    arms = [arm for block in blocks for arm in block.ranked]
    return plan.objective.said(len(n.rounds) for arm in arms for n in arm.numbers.values() if n.rounds)


def _lines(block: ProblemBlock, plan: ComparisonPlan, blocks: int) -> list[str]:
    words = objective_words([block], plan)
    seeds = sorted({len(c.seeds) for c in block.comparisons})
    count = (
        f"{seeds[0]} seed{'s' * (seeds != [1])}"
        if len(seeds) == 1
        else f"{seeds[0]} to {seeds[-1]} seeds"
        if seeds
        else "no pair"
    )
    out = ["; ".join(filter(None, (words, count, problem_words(block, blocks))))]
    arms = {arm.name: arm for arm in block.setting.arms}
    rows = [_row(c, arms, plan) for c in block.comparisons]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    for row, c in zip(rows, block.comparisons, strict=True):
        cells = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        out.append(f"  {cells}".rstrip())
        out += [f"      {note}" for note in c.notes]
    if not block.comparisons:
        out.append(f"  nothing to compare with {block.reference or 'another method'} here")
    return out + footer(block, plan)


def _row(c: Comparison, arms: dict[str, Arm], plan: ComparisonPlan) -> tuple[str, ...]:
    digits = _digits(c, plan)
    least = 1 if plan.scale > 1 else 0  # decimals
    both = [f"{plan.scale * _mean(arms[name], c):.{max(digits - 1, least)}f}" for name in (c.a, c.b)]
    if math.isnan(c.mean):
        change = "-"
    elif math.isnan(c.low):
        change = f"{plan.scale * c.mean:+.{digits}f}"
    else:
        low, high = (f"{plan.scale * x:+.{digits}f}" for x in (c.low, c.high))
        change = f"{plan.scale * c.mean:+.{digits}f} [{low}, {high}]"
    p = "" if math.isnan(c.p_holm) else f"p {_p(c.p_holm)} (flip {_p(c.p_flip)})"
    against = f" ({c.b})" if plan.reference == ALL else ""
    return c.a, f"{both[0]} vs {both[1]}{against}", change, p, said(c, plan)


def said(c: Comparison, plan: ComparisonPlan) -> str:
    """The verdict in words: ``equivalent within 0.50``, ``undecided: about 16 seeds``."""
    least = ""
    if c.n >= 3 and c.verdict != EQUIVALENT:
        seed, value = min(c.differences.items(), key=lambda item: item[1])
        least = f" (least {plan.scale * value:+.{_digits(c, plan)}f}, seed {seed})"
    if c.reason:
        return f"{c.verdict} ({c.reason}){least}"
    if c.verdict == EQUIVALENT:
        margin = plan.scale * (c.margin or 0)
        return f"{c.verdict} within {margin:.2f}" if plan.scale > 1 else f"{c.verdict} within {margin:.3g}"
    if c.verdict == UNDECIDED and c.seeds_needed:
        return f"{c.verdict}: {said_seeds(c.seeds_needed)}{least}"
    return f"{c.verdict}{least}"


def footer(block: ProblemBlock, plan: ComparisonPlan) -> list[str]:
    """What is said under the comparisons of a block."""
    out = []
    for arm in block.setting.arms:
        if arm.excluded:
            all_seeds = len(arm.numbers) + len(arm.excluded)
            reasons = "; ".join(f"seed {seed} {reason}" for seed, reason in sorted(arm.excluded))
            out.append(f"{arm.name}: {len(arm.numbers)} of {all_seeds} seeds; {reasons}")
        if arm.unranked:
            out.append(f"{arm.name}: not compared: {arm.unranked}")
        out += [f"{arm.name}: {note}" for note in arm.notes]
    if not block.comparisons:
        return out
    seeds = sorted({s for c in block.comparisons for s in c.seeds})
    sizes = list({run.summary.get("test_samples", 0) for arm in block.ranked for run in arm.runs.values()})
    on = "on samples like" if plan.population else "on"
    samples = (
        f", {on} these {sizes[0]} test samples"
        if len(sizes) == 1 and sizes[0] and plan.objective.on == "test"
        else ""
    )
    kind = "intervals unadjusted"
    if plan.interval == "bca":
        kind += (
            ", of a bootstrap: far too narrow at so few seeds (25 % of equal methods differ at 3, 16 % at 5)"
        )
    out.append(
        f"paired over seed{'s' * (len(seeds) != 1)} {ranges(seeds)}{samples}; "
        f"Holm over {len(block.comparisons)} comparison{'s' * (len(block.comparisons) != 1)}, {kind}"
    )
    return out


def ranges(numbers: Sequence[int]) -> str:
    """``0-4, 7``."""
    out: list[list[int]] = []
    for number in numbers:
        if out and number == out[-1][-1] + 1:
            out[-1].append(number)
        else:
            out.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in out)


def _digits(c: Comparison, plan: ComparisonPlan) -> int:
    """Decimals by which the interval's half width has two digits, 2 to 4 of shares in percent."""
    width = plan.scale * (c.high - c.low) / 2
    if not math.isfinite(width) or width <= 0:
        return 2 if plan.scale > 1 else 4
    fitting = 1 - math.floor(math.log10(width))
    return min(max(fitting, 2), 3) if plan.scale > 1 else min(max(fitting, 0), 8)


def _mean(arm: Arm, c: Comparison) -> float:
    """Over the seeds of the comparison; where it has none, over the arm's own."""
    finite = [value for seed, value in arm.values.items() if seed in (c.differences or arm.values)]
    finite = [value for value in finite if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def _p(p: float) -> str:
    """``.002``, ``< .001``."""
    if math.isnan(p):
        return "-"
    if p < 0.001:
        return "< .001"
    return f"{p:.3f}".removeprefix("0") if p < 0.1 else f"{p:.2f}".removeprefix("0")
