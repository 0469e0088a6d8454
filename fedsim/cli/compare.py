"""``fedsim compare``: which method is better, seed by seed, and how sure that is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fedsim.cli.arguments import Arguments
from fedsim.cli.choices import add_choices, plan_of, recorded, runs_of
from fedsim.cli.exits import DONE, FAILED
from fedsim.errors import ConfigError, hint
from fedsim.report import comparison, tuned
from fedsim.report.across import ACROSS, summary
from fedsim.report.blocks import ProblemBlock, blocks_of
from fedsim.report.objective import Objective
from fedsim.report.terminal import common_folder
from fedsim.report.verdict import OPPOSITE, Comparison

VERDICTS = tuple(OPPOSITE)


def compare(argv: Sequence[str]) -> int:
    """Compare methods over their common seeds: better, worse, equivalent or undecided.

    Exit codes: 0, computed, whatever the verdicts; 1, an --expect is not met; 2, nothing to compare.
    """
    args = _parser().parse_args(argv)
    if args.across and args.json:
        raise ConfigError("--across: its line is no part of comparison.json; leave --json out")
    runs = runs_of(args)
    plan = plan_of(args, runs)
    if args.population:
        if args.until is not None:
            raise ConfigError("--population: predictions are the final model's; leave --until out")
        plan = replace(plan, population=True)
        if plan.objective != Objective(at="last"):
            raise ConfigError("--population: of the final model's test accuracy only; type --at last")
    blocks = blocks_of(runs, plan)
    pairs = [c for block in blocks for c in block.comparisons]
    if not pairs:
        raise ConfigError(_nothing(blocks))
    if not any(c.seeds for c in pairs):
        raise ConfigError(
            "nothing to compare: no two methods have a finished run of a common seed in any setting"
        )
    wanted = [_expected(text, pairs, blocks) for text in args.expect]
    if args.json:
        command = recorded(argv, args.dirs, "compare")
        from fedsim.run.key import version

        print(comparison.to_text(comparison.document(blocks, plan, command, args.dirs, version())), end="")
    else:
        print(
            "\n".join(
                [
                    *comparison.lines(blocks, plan),
                    *summary(blocks, plan, args.across),
                    *tuned.said(blocks),
                    *earlier(blocks, common_folder(args.dirs)),
                ]
            )
        )
    unmet = [line for name, verdict in wanted for line in _unmet(name, verdict, pairs)]
    for line in unmet:
        print(f"fedsim: {line}", file=sys.stderr)
    return FAILED if unmet else DONE


def _parser() -> Arguments:
    parser = Arguments(prog="fedsim compare", description=(compare.__doc__ or "").splitlines()[0])
    add_choices(parser)
    parser.add_argument(
        "--against", metavar="M,...", help="methods compared with the reference; default: all"
    )
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar='"M VERDICT"',
        help="exit code 1 if it is another one",
    )
    parser.add_argument(
        "--population", action="store_true", help="over other test samples too (evaluation.predictions=true)"
    )
    parser.add_argument(
        "--across",
        choices=tuple(ACROSS),
        default="",
        help="of many settings: bayes (signed-rank test, within the margin equivalent) or bootstrap",
    )
    return parser


def _nothing(blocks: Sequence[ProblemBlock]) -> str:
    reasons = [
        f"{arm.name}: {arm.unranked}" for block in blocks for arm in block.setting.arms if arm.unranked
    ]
    names = sorted({arm.name for block in blocks for arm in block.setting.arms})
    if len(blocks) > 1:
        keys = dict.fromkeys(key for block in blocks for key in block.setting.differing)
        reasons.append(f"runs that differ in {', '.join(list(keys)[:4]) or 'their samples'} are not compared")
    return "; ".join(
        [
            f"nothing to compare: no setting has two methods with numbers (there is {', '.join(names)})",
            *reasons,
        ]
    )


def _expected(text: str, pairs: Sequence[Comparison], blocks: Sequence[ProblemBlock]) -> tuple[str, str]:
    """``fedspeed better`` as a name and a verdict; a method stands for its arm, whatever that is called beside it."""
    name, _, verdict = text.strip().rpartition(" ")
    name = name.strip()
    if verdict not in VERDICTS or not name:
        raise ConfigError(f"--expect {text!r}: type a method and one of {', '.join(VERDICTS)}")
    names = dict.fromkeys(name for c in pairs for name in (c.a, c.b))
    if name in names:
        return name, verdict
    arms = [arm for block in blocks for arm in block.setting.arms if arm.name in names]
    own = list(dict.fromkeys(arm.name for arm in arms if arm.group.method == name))
    if len(own) > 1:
        raise ConfigError(
            f"--expect {text!r}: several arms are of that method; type one of: {'; '.join(own)}"
        )
    if not own:
        near = hint(name, [*names, *(arm.group.method for arm in arms)])
        raise ConfigError(
            f"--expect {text!r}: no comparison has {name!r}{near}; there are {'; '.join(names)}"
        )
    return own[0], verdict


def _unmet(name: str, verdict: str, pairs: Sequence[Comparison]) -> list[str]:
    """What is said of each comparison of ``name`` that came out otherwise."""
    own = [(c.verdict, c.b) for c in pairs if c.a == name]
    own += [(OPPOSITE[c.verdict], c.a) for c in pairs if c.b == name]
    return [
        f"expected {name} {verdict}, but against {other} it is {found}"
        for found, other in own
        if found != verdict
    ]


def earlier(blocks: Sequence[ProblemBlock], root: Path) -> list[str]:
    """A line for each comparison that a report gave a verdict on with fewer seeds."""
    known: dict[tuple[str, str, str], int] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads((root / "report" / "comparison.json").read_text(encoding="utf-8"))
        for block in before["blocks"]:
            known |= {(block["problem_hash"], c["a"], c["b"]): int(c["n"]) for c in block["comparisons"]}
    return [
        f"{c.a}: compared before with n = {n}; whoever adds seeds until it is significant errs more often than in 5 %"
        for block in blocks
        for c in block.comparisons
        if 0 < (n := known.get((block.setting.hash, c.a, c.b), 0)) < c.n
    ]
