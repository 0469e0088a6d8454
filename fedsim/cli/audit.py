"""``fedsim audit``: what clients did and are worth; whether one can tell who was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.cli.arguments import Arguments, check_runs, place
from fedsim.cli.asjson import aside
from fedsim.cli.value import add_shared, said, seeds_of
from fedsim.errors import ConfigError


def audit(argv: Sequence[str]) -> int:
    """Look at a run's clients, or bound epsilon from below by the canaries of runs with audit.canaries=....

    Returns 0, or 1 if a claimed epsilon is below the bound.
    """
    parser = Arguments(prog="fedsim audit", description=(audit.__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=place, metavar="RUN", help="a finished run folder; seeds of one"
    )
    parser.add_argument(
        "--clients", action="store_true", help="a table of the clients: updates, values, flags"
    )
    parser.add_argument(
        "--no-loo", action="store_true", help="no values: nothing is trained without a client"
    )
    parser.add_argument(
        "--score", choices=("loss", "gap"), default="loss", help="what canaries are guessed by"
    )
    parser.add_argument("--claimed", type=float, metavar="EPS", help="epsilon that the runs claim to keep")
    parser.add_argument(
        "--delta", type=float, help="of that claim; default: the one that the runs account for, else 0"
    )
    add_shared(parser)
    args = parser.parse_args(argv)
    check_runs(args.runs, args.allow)
    if args.delta is not None and not 0 <= args.delta < 1:
        raise ConfigError(f"--delta {args.delta:g}: must be in [0, 1)")
    if args.claimed is not None and not args.claimed >= 0:
        raise ConfigError(f"--claimed {args.claimed:g}: must be a number, not negative")
    from fedsim.tracking.rows import to_json

    if not args.clients:
        from fedsim.replay.membership import leave_word, lines, membership

        with aside(args.json):
            bound = membership(args.runs, score=args.score, claimed=args.claimed, delta=args.delta)
        leave_word(bound)
        print(to_json(bound) if args.json else "\n".join(lines(bound)), flush=True)
        return int(bool(bound["broken"]))
    if len(args.runs) > 1:
        raise ConfigError("--clients: give one run; --seeds 0-4 adds others of its seeds")
    from fedsim.replay.inspection import audit as look
    from fedsim.replay.inspection import table
    from fedsim.replay.variants import BaseRun
    from fedsim.replay.worth import plan
    from fedsim.report.objective import Objective

    goal = Objective.parse(args.objective) if args.objective else None
    todo = None
    if not args.no_loo:
        todo = plan(args.runs[0], objective=goal, seeds=seeds_of(args.seeds), margin=args.margin)
        if not args.json or args.dry_run:
            print(to_json(todo.costs()) if args.json else said(todo.costs()), flush=True)
    if args.dry_run:
        return 0
    quiet = (lambda text: None) if args.json else lambda text: print(text, flush=True)
    with aside(args.json):
        found = look(BaseRun.of(args.runs[0]), todo, args.workers, quiet)
    share = todo is not None and todo.objective.share
    print(to_json(found) if args.json else "\n".join(table(found, 100 if share else 1)), flush=True)
    return 0
