"""``fedsim value``: what each client contributes."""

from __future__ import annotations

import json
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsim.cli.arguments import Arguments, add_allow, check_runs, place
from fedsim.cli.asjson import aside
from fedsim.errors import ConfigError


def value(argv: Sequence[str]) -> int:
    """Say what each client contributes to a run: by leaving it out, or by its Shapley or Banzhaf value.

    Returns 0 once all runs are done.
    """
    parser = Arguments(prog="fedsim value", description=(value.__doc__ or "").splitlines()[0])
    parser.add_argument(
        "run", type=place, metavar="RUN", help="a finished run folder, in which all are there"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--loo", dest="kind", action="store_const", const="loo", help="v(all) - v(all but k); default"
    )
    kind.add_argument(
        "--shapley", dest="kind", action="store_const", const="shapley", help="sums to v(all) - v(nobody)"
    )
    kind.add_argument(
        "--banzhaf", dest="kind", action="store_const", const="banzhaf", help="mean over all coalitions"
    )
    add_shared(parser)
    parser.add_argument("--runs", type=int, metavar="B", help="coalitions at most; needed beyond 8 players")
    parser.add_argument(
        "--method",
        choices=("permutations", "kernel"),
        default="permutations",
        help="how --runs are chosen; kernel: least squares (Kernel SHAP), with --shapley",
    )
    parser.add_argument("--players", metavar="WHO", help='domain, or a JSON file {"name": [clients], ...}')
    args = parser.parse_args(argv)
    if args.runs is not None and args.runs < 1:
        raise ConfigError(f"--runs {args.runs}: at least 1")
    check_runs([args.run], args.allow)
    from fedsim.replay.worth import find, plan
    from fedsim.report.objective import Objective
    from fedsim.tracking.rows import to_json

    todo = plan(
        args.run,
        args.kind or "loo",
        objective=Objective.parse(args.objective) if args.objective else None,
        players=args.players,
        seeds=seeds_of(args.seeds),
        runs=args.runs,
        margin=args.margin,
        kernel=args.method == "kernel",
    )
    costs = todo.costs()
    if not args.json or args.dry_run:
        print(json.dumps(costs) if args.json else said(costs), flush=True)
    if args.dry_run:
        return 0
    with aside(args.json):
        found = find(
            todo, args.workers, (lambda text: None) if args.json else lambda text: print(text, flush=True)
        )
    print(to_json(found) if args.json else "\n".join(table(found, todo.objective.share)), flush=True)
    return 0


def add_shared(parser: Arguments) -> None:
    """Flags of the commands that compute runs without some clients."""
    parser.add_argument("--objective", metavar="COLUMN", help="what a run is worth; default: val/accuracy")
    parser.add_argument(
        "--seeds", metavar="0-4", help="or 0,1,2; default: the run's own; from three on there are verdicts"
    )
    parser.add_argument(
        "--margin", type=_margin, help="values within it make no difference; default: .005 of accuracies"
    )
    parser.add_argument(
        "--workers", type=_workers, default=1, help="runs at once, in processes of their own; default: 1"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say how many runs, how many are there, and stop"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    add_allow(parser)


def _margin(word: str) -> float:
    if not 0 <= (found := float(word)) < math.inf:
        raise ArgumentTypeError(f"{word}: must be finite and not negative")
    return found


def _workers(word: str) -> int:
    if (found := int(word)) < 1:
        raise ArgumentTypeError(f"{word}: at least 1")
    return found


def seeds_of(words: str | None) -> list[int]:
    """``0,1,2`` or ``0-4``."""
    if not words:
        return []
    try:
        first, dash, last = words.partition("-")
        found = list(range(int(first), int(last) + 1)) if dash else [int(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {words}: whole numbers, as in 0,1,2 or 0-4") from None
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"--seeds {words}: at least one, each once")
    return found


def said(costs: Mapping[str, Any]) -> str:
    """``31 coalitions, 31 runs: 1 is there, 30 to compute, about 4 min``."""
    minutes = costs["seconds"] / 60
    time = f"{minutes:.0f} min" if minutes >= 2 else f"{costs['seconds']:.0f} s"
    return (
        f"{costs['coalitions']} coalitions, {costs['runs']} runs: {costs['done']} there, {costs['todo']} to compute, "
        f"about {time}"
    )


def table(found: Mapping[str, Any], share: bool) -> Iterator[str]:
    """A line a player, in points where the objective is a share."""
    scale, unit = (100, "points") if share else (1, "")
    kind = {"loo": "leave-one-out", "shapley": "Shapley", "banzhaf": "Banzhaf"}[found["kind"]]
    seeds = len(found["seeds"])
    yield f"{kind} values {unit} of {found['objective']}, {seeds} seed{'s' * (seeds > 1)}".replace("  ", " ")
    if fewer := re.search(r"mean of the last (\d+) evaluations", found["objective"]):
        yield f"of runs with fewer than {4 * int(fewer[1])} evaluations: the last quarter of them"
    width = max(6, *(len(p["name"]) for p in found["players"]))
    for p in found["players"]:
        interval = ""
        if p["low"] is not None:
            interval = f"  [{scale * p['low']:+.2f}, {scale * p['high']:+.2f}]  {p['verdict']}"
        yield f"  {p['name']:<{width}} {scale * p['value']:+8.2f}{interval}"
    total = sum(p["value"] for p in found["players"])
    if found["kind"] == "shapley":
        yield f"  {'sum':<{width}} {scale * total:+8.2f}"
    if seeds == 1:
        yield "one seed: no verdict; give --seeds 0-4"
