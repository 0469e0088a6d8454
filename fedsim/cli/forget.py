"""``fedsim forget``: a run without some clients, exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedsim.cli.arguments import Arguments, add_allow, check_runs, place
from fedsim.cli.asjson import aside
from fedsim.errors import ConfigError


def forget(argv: Sequence[str]) -> int:
    """Compute the run that there would have been without some clients or samples, from the last checkpoint before them.

    Returns 0 once it is done.
    """
    parser = Arguments(prog="fedsim forget", description=(forget.__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=place, metavar="RUN", help="a finished run folder")
    parser.add_argument("--client", action="append", default=[], metavar="K[,K]", help="clients to forget")
    parser.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="K:P[,P]",
        help="positions among client K's samples to forget",
    )
    parser.add_argument(
        "--purge", action="store_true", help="then delete RUN and cached embeddings of its samples"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be computed, and stop")
    parser.add_argument("--json", action="store_true", help="say it as JSON: what forget.json holds")
    add_allow(parser)
    args = parser.parse_args(argv)
    check_runs([args.run], args.allow)
    clients = {k for words in args.client for k in _numbers(words, "--client", "3 or 3,7")}
    samples = _samples(args.samples)
    from fedsim.replay import unlearning

    todo = unlearning.plan(args.run, clients, samples)
    if args.dry_run:
        facts = todo.facts()
        met = f"first asked in round {todo.first_met}" if todo.first_met else "never asked"
        why = (
            f"from the start, since {todo.why_all}"
            if todo.why_all
            else "from the last checkpoint before that"
        )
        print(json.dumps(facts) if args.json else f"{met}; would be computed {why}: {todo.folder}")
        return 0
    if todo.why_all and not args.json:
        print(f"begins anew: {todo.why_all}", flush=True)
    with aside(args.json):
        found = unlearning.forget(todo, purge=args.purge)
    if args.json:
        print(json.dumps(found), flush=True)
        return 0
    rounds = int(todo.config.rounds)
    print(f"forgotten: {found['without']}")
    print(f"computed:  {found['cost']['rounds']} of {rounds} rounds, from round {found['start'] + 1}")
    print(f"weights:   {found['hashes']['before'][:16]} before, {found['hashes']['after'][:16]} after")
    print(
        "not undone: reports, trackers and copies made of the old run"
        + ("" if args.purge else f", and {args.run}")
    )
    return 0


def _samples(asked: Sequence[str]) -> dict[int, list[int]]:
    """Positions by client, of ``3:0,17`` and the like."""
    samples: dict[int, list[int]] = {}
    for words in asked:
        client, colon, positions = words.partition(":")
        if not colon:
            raise ConfigError(f"--samples {words}: write a client and positions, as in --samples 3:0,17")
        try:
            samples.setdefault(int(client), []).extend(map(int, positions.split(",")))
        except ValueError:
            raise ConfigError(
                f"--samples {words}: one client and positions, as in --samples 3:0,17"
            ) from None
    return samples


def _numbers(words: str, flag: str, example: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {words}: whole numbers, as in {flag} {example}") from None
