"""``fedsim report``: runs compared in a table here, and in a page with figures and tables in a folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsim.cli.arguments import Arguments, folder, place
from fedsim.cli.serving import add_serving, serve_report
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.report.runs import Run


def report(argv: Sequence[str], live: bool = False) -> int:
    """Compare all runs in the given folders: a table here; page, figures and table in a folder.

    ``live``: build the report once for the server that ``--serve`` started.
    """
    parser = Arguments(prog="fedsim report", description=(report.__doc__ or "").partition("\n")[0])
    parser.add_argument("dirs", nargs="+", type=place, metavar="DIR", help="run folder, or a folder of them")
    parser.add_argument("--target", type=float, help="accuracy in 0..1 whose first crossing is reported")
    parser.add_argument(
        "--out",
        type=place,
        metavar="DIR",
        help="where to write report.html; default: report/ beside the runs",
    )
    parser.add_argument(
        "--system",
        metavar="FILE",
        help="price the runs on other devices: an option's name or a YAML file like one",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of that system, e.g. system.traces=DIR",
    )
    add_serving(parser)
    args = parser.parse_args(argv)
    if args.serve and not live:
        return serve_report(args, lambda: report(argv, live=True))
    if args.set and not args.system:
        raise ConfigError("--set: only with --system")
    if args.target is not None and not 0 <= args.target <= 1:
        raise ConfigError(f"--target {args.target:g}: must be in [0, 1], as accuracies are")
    for path in args.dirs:
        folder(path)
    from fedsim.report import compare, group_runs, heterogeneity, load_runs, print_table
    from fedsim.report.page import write_report
    from fedsim.report.terminal import common_folder

    runs = load_runs(args.dirs)
    if not runs:
        raise ConfigError(f"no run folder (with metrics.jsonl) in {', '.join(map(str, args.dirs))}")
    if args.system:
        from fedsim.run.whatif import compose_system, reprice

        system = compose_system(args.system, args.set)
        runs = [reprice(run, system) for run in runs]
    frame, out = compare(runs, args.target), args.out or common_folder(args.dirs) / "report"
    groups = group_runs(runs)
    print_table(frame)
    for line in heterogeneity.lines(groups):
        print(f"partition: {line}")
    commands = [*_sweeps(runs), shlex.join(["fedsim", "report", *argv])]
    try:
        page = write_report(groups, frame, out, commands)
    except OSError as error:
        raise ConfigError(
            f"{out}: the report cannot be written there ({error.strerror}); give --out DIR"
        ) from error
    print(f"report:  {page}")
    print(f"tables:  {out / 'table.csv'}, {out / 'table.tex'}")
    print(f"figures: {out / '*.png'}", flush=True)
    return 0


def _sweeps(runs: Sequence[Run]) -> list[str]:
    """The commands of the latest sweeps into the folders of these runs, as Hydra noted them."""
    commands = []
    for parent in dict.fromkeys(run.dir.parent for run in runs):
        with suppress(OSError, OmegaConfBaseException, YAMLError):
            noted = OmegaConf.select(OmegaConf.load(parent / "multirun.yaml"), "hydra.overrides.task")
            commands.append(shlex.join(["fedsim", "-m", *map(str, noted or ())]))
    return commands
