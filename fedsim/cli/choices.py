"""Flags that ``fedsim report`` and ``fedsim compare`` share: which runs, which number of each, compared with whom."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from fedsim.cli.arguments import Arguments, folder, place
from fedsim.errors import ConfigError
from fedsim.report.blocks import ALL, ComparisonPlan
from fedsim.report.choosing import assignments, chosen, first_rounds, renamed
from fedsim.report.objective import PLACES, Objective
from fedsim.report.runs import Run, load_runs


def add_choices(parser: Arguments) -> None:
    """Add the flags."""
    parser.add_argument("dirs", nargs="+", type=place, metavar="DIR", help="run folder, or a folder of them")
    add = parser.add_argument
    add("--objective", metavar="COLUMN", help="of metrics.jsonl, such as accuracy, loss, clients/accuracy")
    add("--on", help="test (default), val, clients, clients_val")
    add("--at", help="last, mean:K of the last K evaluations (default mean:10), or best_val")
    add("--direction", help="max, min, or auto: min for losses, errors, costs, spreads, gaps")
    add("--clients", help="mean (default), weighted or worst_tenth over clients")
    add(
        "--reference",
        default="",
        metavar="M",
        help="the method compared with; all: every pair; default: fedavg",
    )
    add("--margin", type=float, help="differences within it are none; default: 0.005 of accuracies in 0..1")
    add("--interval", default="t", choices=("t", "bca"), help="bca: bootstrap, far too narrow below 20 seeds")
    add(
        "--where",
        action="append",
        default=[],
        metavar="KEY=V",
        help="runs to take: =, !=, <, <=, >, >=; a,b is or",
    )
    add("--until", type=int, metavar="R", help="read the first R rounds of each run, as if it had no more")
    add("--rename", action="append", default=[], metavar="OLD=NEW", help="another name for a method")
    add("--json", action="store_true", help="print comparison.json and nothing else")


def plan_of(
    args: argparse.Namespace, runs: Sequence[Run], default: Objective | None = None
) -> ComparisonPlan:
    """The comparison that the flags ask for; what they leave open is as ``default``, or the runs' own ``objective``."""
    if args.margin is not None and not 0 <= args.margin < math.inf:
        raise ConfigError(f"--margin {args.margin:g}: must be finite and not negative")
    renames = assignments("--rename", args.rename, args.methods)
    reference = renames.get(args.reference, args.reference)
    if not reference and "fedavg" in renames:
        reference = renames["fedavg"] if any(run.method == renames["fedavg"] for run in runs) else ""
    against = getattr(args, "against", None) or ""
    if against and reference == ALL:
        raise ConfigError("--against: not together with --reference all")
    names = tuple(renames.get(name, name) for name in words_of(against))
    return ComparisonPlan(_objective(args, runs, default), reference, names, args.margin, args.interval)


def _objective(args: argparse.Namespace, runs: Sequence[Run], default: Objective | None) -> Objective:
    objectives = {Objective.of(run.config, "test") for run in runs}
    common = default or (objectives.pop() if len(objectives) == 1 else Objective())
    flags = {
        f.name: getattr(args, f.name) for f in fields(Objective) if getattr(args, f.name, None) is not None
    }
    place = (args.objective or "").rpartition("/")[0]
    if args.on and place in PLACES and place != args.on:
        raise ConfigError(
            f"--objective {args.objective}: says another place than --on {args.on}; leave one out"
        )
    if args.objective is None:
        return replace(common, **({"on": "test"} | flags))
    kept = {"at": common.at, "clients": common.clients}
    return Objective.parse(args.objective, **(flags if "/" in args.objective else kept | flags))


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The runs that the flags choose, under the names they give.

    Raises:
        ConfigError: if there are none.
    """
    for path in args.dirs:
        folder(path)
    runs = load_runs(args.dirs)
    if not runs:
        raise ConfigError(f"no run folder (with metrics.jsonl) in {', '.join(map(str, args.dirs))}")
    shown = first_rounds(chosen(runs, args.where), args.until)
    args.methods = list(dict.fromkeys(run.method for run in shown))  # as they are called before --rename
    return renamed(shown, assignments("--rename", args.rename, args.methods))


def order_of(args: argparse.Namespace) -> list[str]:
    """The words of ``--order``, methods as they are called after ``--rename``."""
    renames = assignments("--rename", args.rename, args.methods)
    return [renames.get(word, word) for word in words_of(args.order)]


def recorded(argv: Sequence[str], dirs: Sequence[Path], name: str) -> list[str]:
    """The command as it is recorded: folders by their names, wherever it was typed."""
    places = {str(path) for path in dirs}
    options = [word for word in argv if str(Path(word).expanduser()) not in places]
    return ["fedsim", name, *(path.resolve().name for path in dirs), *options]


def words_of(text: str | None) -> list[str]:
    """``a,b`` as a list."""
    text = text or ""
    return [word.strip() for word in text.split(",") if word.strip()]
