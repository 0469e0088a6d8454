"""The papers' claims, each in a small setting in which it should show: runs, verdicts, and the block of its page.

    python -m experiments.claims theory                                        minutes on one core, as are all below
    python -m experiments.claims robust
    python -m experiments.claims long_tail
    python -m experiments.claims fleet --data ../shared/data/mnist --traces ../shared/data/traces
    python -m experiments.claims optimisers --data ../shared/data/cifar10
    python -m experiments.claims fraug --data ../shared/data/digits6

What is chosen is chosen on validation samples with seed 0, by the same number of trials for every arm; the comparison
is on test samples with other seeds, five unless the page says otherwise (``--seeds``). Finished runs are skipped, so it
can be stopped and started again. The block that the claim's page in docs/results holds is printed, and whether the page
has the same; ``--write`` puts it there. Further arguments are overrides for every run.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from experiments import theory
from experiments.claims_listed import CLAIMS, Claim, Question
from fedsim.cli.main import command
from fedsim.report.blocks import ComparisonPlan, blocks_of
from fedsim.report.comparison import differing_words, lines, said
from fedsim.report.objective import Objective
from fedsim.report.runs import Run, load_runs
from fedsim.report.verdict import judge, pair

PAGES = Path(__file__).resolve().parents[1] / "docs/results"
TUNING = 0  # the seed that settings are chosen with
QUIET = ("tracker=quiet", "checkpoint.every=0")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claim", choices=("theory", *CLAIMS))
    parser.add_argument("--data", help="folder of the data, where the claim needs one")
    parser.add_argument("--traces", help="folder of the device traces, for fleet")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--seeds", default="1,2,3,4,5", help="default: %(default)s")
    parser.add_argument("--arms", help="comma-separated; default: all of the claim")
    parser.add_argument("--engine", default="serial", help="default: %(default)s; no result depends on it")
    parser.add_argument("--read", action="store_true", help="make no runs, read those that are there")
    parser.add_argument("--write", action="store_true", help="put the block into the page")
    args, overrides = parser.parse_known_args(argv)
    seeds, root, code = [int(s) for s in args.seeds.split(",")], args.out / args.claim, 0
    if args.claim == "theory":
        page, block = "theory", exact(seeds, root)
    else:
        claim = CLAIMS[args.claim].with_arms(args.arms.split(",") if args.arms else ())
        overrides += [f"{k}={v}" for k, v in (("data.path", args.data), ("system.traces", args.traces)) if v]
        if not args.read:
            code = make(claim, seeds, root, [f"engine={args.engine}", *QUIET, *overrides])
        runs = [r for r in load_runs([root / "runs"]) if r.method in claim.arms and r.seed in seeds]
        page = claim.page
        block = [line for question in claim.questions for line in [*answered(question, runs, claim), ""]]
    print("\n".join(block))
    settle(PAGES / f"{page}.md", args.claim, "\n".join(block).strip(), args.write)
    return code


def make(claim: Claim, seeds: Sequence[int], root: Path, words: Sequence[str]) -> int:
    """All runs of the claim; the worst exit code."""
    codes = []
    for arm, settings in claim.arms.items():
        own = [*claim.common, *settings, f"method={arm}", *words, f"out={root}"]
        own += chosen(claim, arm, root, own)
        for problem in claim.problems:
            codes.append(command(["-m", *own, *problem, "name=runs", f"seed={','.join(map(str, seeds))}"]))
    return max(codes)


def chosen(claim: Claim, arm: str, root: Path, words: Sequence[str]) -> list[str]:
    """Of the arm's grid, the settings that are best on validation samples; of equally good ones the lowest."""
    grid = claim.grid.get(arm, claim.grid.get("", ()))
    if not grid:
        return []
    command(["-m", *words, *claim.problems[0], *grid, "name=tuning", f"seed={TUNING}"])
    objective, keys = Objective(on="val"), [axis.partition("=")[0] for axis in grid]

    def rank(run: Run) -> tuple[float, list[float]]:
        value = objective.number(run.rows).value
        return -math.inf if math.isnan(value) else value, [-float(run.settings[key]) for key in keys]

    tried = [run for run in load_runs([root / "tuning"]) if run.method == arm and run.status == "done"]
    best = max(tried, key=rank)
    return [f"{key}={best.settings[key]}" for key in keys]


def answered(question: Question, runs: Sequence[Run], claim: Claim) -> list[str]:
    """The question, what ``fedsim compare`` says, and means with their deviations."""
    if question.total:
        return totalled(question, runs, claim)
    objective = Objective.parse(question.objective, at=question.at)
    plan = ComparisonPlan(objective, question.reference, question.against)
    blocks = blocks_of(runs, plan)
    columns = {differing_words(block) if block.setting.differing else "as it is": block for block in blocks}
    values = {
        where: {arm.group.method: list(arm.values.values()) for arm in block.ranked}
        for where, block in columns.items()
    }
    return [
        f"**{question.words}**",
        "",
        "```",
        *lines(blocks, plan),
        "```",
        "",
        *spread(question.objective, values, plan.scale),
    ]


def totalled(question: Question, runs: Sequence[Run], claim: Claim) -> list[str]:
    """The same verdicts on a column summed up to the end of each run; not finite where it ended below its target."""
    values: dict[str, dict[int, float]] = {arm: {} for arm in claim.arms}
    for run in runs:
        target = (run.config.get("evaluation") or {}).get("target") or 0.0
        there = list(run.series("accuracy").values())[-1] >= target
        values[run.method][run.seed] = run.total(question.total) if there else math.nan
    reference = question.reference
    plan = ComparisonPlan(Objective(question.total, at="last"), reference)
    family = [
        pair((a, v), (reference, values[reference]), sign=-1) for a, v in values.items() if a != reference
    ]
    width = max(map(len, values))
    rows = [
        f"  {c.a:{width}}  {fmean(values[c.a].values()):.4g} vs {fmean(values[c.b].values()):.4g}  "
        f"{c.mean:+.3g} [{c.low:+.3g}, {c.high:+.3g}]  p {c.p_holm:.3f}  {said(c, plan)}"
        for c in judge(family)
    ]
    head = f"{question.total} in all; less is better, positive differences are in the method's favour"
    foot = f"paired over seeds; Holm over {len(family)} comparisons, intervals unadjusted"
    written = spread(question.total, {"as it is": {a: list(v.values()) for a, v in values.items()}}, 1.0)
    return [f"**{question.words}**", "", "```", head, *rows, foot, "```", "", *written]


def spread(what: str, values: Mapping[str, Mapping[str, Sequence[float]]], scale: float) -> list[str]:
    """A table of means ± sample deviations over seeds: an arm a row, a problem a column."""
    share = f"{what}, %" if scale > 1 else what
    out = [f"| mean ± sample deviation of {share} | {' | '.join(values)} |", "|---|" + "---|" * len(values)]
    for arm in dict.fromkeys(arm for found in values.values() for arm in found):
        cells = [cell(found.get(arm, ()), scale) for found in values.values()]
        out.append(f"| {arm} | {' | '.join(cells)} |")
    return out


def cell(found: Sequence[float], scale: float) -> str:
    """``95.1 ± 0.4``."""
    if not found:
        return "-"
    mean = scale * fmean(found)
    digits = 1 if scale > 1 or abs(mean) < 100 else 0
    return f"{mean:.{digits}f}" + (f" ± {scale * stdev(found):.{digits}f}" if len(found) > 1 else "")


def exact(seeds: Sequence[int], root: Path, rates: Mapping[float, int] = theory.RATES) -> list[str]:
    """The block of the theory page."""
    table, least = theory.optimisers(seeds, root, rates), f"lr{min(rates):g}"
    plan = ComparisonPlan(Objective("distance", at="last", direction="min"), "fedavg")
    found = lines(blocks_of(load_runs([root / least]), plan), plan)
    written = [f"Distance to the optimum of clients that weigh alike, {least}:", "", "```", *found, "```"]
    return [
        "Largest distance over seeds to the optimum, of clients that weigh alike and of clients that weigh by samples:",
        "",
        *table,
        "",
        *written,
        "",
        "Distance from the honest mean in deviations of an honest update, the worst of three attacks, by hostile ones:",
        "",
        *theory.breakdown(seeds),
        "",
        "Variance of a peer's weights over that at the start:",
        "",
        *theory.variance(seeds),
    ]


def settle(page: Path, name: str, block: str, write: bool) -> bool:
    """Whether ``page`` holds ``block`` between the marks of the claim ``name``; ``write`` puts it there."""
    begin, end = f"<!-- made by experiments.claims {name} -->", f"<!-- end of {name} -->"
    text = page.read_text()
    found = re.search(f"{re.escape(begin)}\n(.*?)\n{re.escape(end)}", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"{page}: no line {begin}")
    same = found[1].strip() == block
    if write and not same:
        page.write_text(text[: found.start(1)] + block + text[found.end(1) :])
    print(f"{page.name}: {'the same' if same else 'written' if write else 'holds another block'}", flush=True)
    return same


if __name__ == "__main__":
    sys.exit(main())
