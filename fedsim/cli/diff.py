"""``fedsim diff``: where two runs part."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.cli.arguments import Arguments, add_allow, check_runs, folder, place
from fedsim.cli.asjson import aside


def diff(argv: Sequence[str]) -> int:
    """Say where two runs part: settings, versions, data, cohorts, weights; then the first message or update.

    Returns 0 if the weights agree in all common rounds, 1 if not, 2 if the runs cannot be compared.
    """
    parser = Arguments(prog="fedsim diff", description=(diff.__doc__ or "").splitlines()[0])
    parser.add_argument("a", type=place, metavar="A", help="a run folder")
    parser.add_argument("b", type=place, metavar="B", help="another one")
    parser.add_argument(
        "--metrics-only", action="store_true", help="read what is recorded; compute no round again"
    )
    parser.add_argument(
        "--json", action="store_true", help="the same facts as JSON, as diff.schema.json says"
    )
    add_allow(parser)
    args = parser.parse_args(argv)
    if not args.metrics_only:
        check_runs([args.a, args.b], args.allow)
    from fedsim.replay import parting

    with aside(True):
        found = parting.diff(folder(args.a), folder(args.b), metrics_only=args.metrics_only)
    if args.json:
        from fedsim.run.key import version
        from fedsim.tracking.rows import to_json

        print(to_json({"schema": 1, "fedsim": version(), **found}), flush=True)
        return int(found["code"])
    for line in parting.lines_of(found):
        print(line)
    if "error" in found:
        print(f"fedsim: {found['error']}", flush=True)
    return int(found["code"])
