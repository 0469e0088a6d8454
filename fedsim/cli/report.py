"""``fedsim report``: runs compared in a table here, and in a page with figures and tables in a folder."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsim.cli.arguments import Arguments, add_allow, check_runs, place
from fedsim.cli.choices import add_choices, order_of, plan_of, recorded, runs_of, words_of
from fedsim.cli.serving import add_serving, serve_report
from fedsim.errors import ConfigError, hint

if TYPE_CHECKING:
    from fedsim.report.blocks import ComparisonPlan, ProblemBlock
    from fedsim.report.runs import Group, Run

FORMATS = ("md", "tex", "csv", "json")


def report(argv: Sequence[str], live: bool = False) -> int:
    """Compare all runs in the given folders: a table here; page, figures and table in a folder.

    ``live``: build the report once for the server that ``--serve`` started.
    """
    args = _parser().parse_args(argv)
    if args.serve and not live:
        return serve_report(args, lambda: report(argv, live=True))
    _check(args)
    runs = _priced(args, runs_of(args))
    from fedsim.report import (
        clients_plan,
        compare,
        compared_blocks,
        default_plan,
        heterogeneity,
        target_of,
    )
    from fedsim.report.blocks import blocks_of
    from fedsim.report.page import write_report
    from fedsim.report.terminal import common_folder

    order, asked = order_of(args), bool(args.objective or args.on or args.at)
    plan = plan_of(args, runs, None if args.objective or args.on else default_plan(runs).objective)
    blocks = blocks_of(runs, plan, order) if asked else compared_blocks(runs, plan, order)
    if asked and not any(block.ranked for block in blocks):
        arms = [arm for block in blocks for arm in block.setting.arms]
        raise ConfigError(next((arm.unranked for arm in arms if arm.unranked), "no run is finished"))
    _say_unplaced(order, blocks)
    options = {"columns": words_of(args.columns)}
    frame = compare(runs, args.target, plan=plan, blocks=blocks, **options)
    out = args.out or common_folder(args.dirs) / "report"
    groups = _groups(runs, blocks)
    commands = [*_sweeps(runs), shlex.join(["fedsim", "report", *argv])]
    document = _document(blocks, plan, recorded(argv, args.dirs, "report"), args.dirs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        page = write_report(groups, frame, out, commands)
        (out / "comparison.json").write_text(document, encoding="utf-8")
        drawn = _curves(args, blocks, plan, out)
        own = None if asked else clients_plan(runs, plan)
        second = None if own is None else compare(runs, target_of(runs, args.target), plan=own, **options)
        if second is not None:
            _write(second, out)
    except OSError as error:
        unwritten = f"{out}: the report cannot be written there ({error.strerror}); give --out DIR"
        if args.out or not (args.json or args.format):
            raise ConfigError(unwritten) from error
        print(f"fedsim: {unwritten}", file=sys.stderr)
    if args.json or args.format:
        print(
            document if args.json or args.format == "json" else _printed(args, frame, blocks, plan, order),
            end="",
        )
        return 0
    _show(args, [frame] if second is None else [frame, second], blocks, plan, order)
    _say_places(heterogeneity.lines(groups), page, out, drawn)
    return 0


def _say_places(partition: Iterable[str], page: Path, out: Path, drawn: Iterable[Path]) -> None:
    for line in partition:
        print(f"partition: {line}")
    print(f"report:  {page}")
    print(f"tables:  {out / 'table.csv'}, {out / 'table.tex'}, {out / 'comparison.json'}")
    print(f"figures: {', '.join(map(str, [out / '*.png', *drawn]))}", flush=True)


def _groups(runs: Sequence[Run], blocks: Sequence[ProblemBlock]) -> list[Group]:
    """What is drawn as one, in the order of the table; of several problems with what tells these apart."""
    from fedsim.report import group_runs

    groups = [arm.group for block in blocks for arm in block.setting.arms]
    if len({group.label for group in groups}) == len(groups):
        return groups
    places = {run.dir: at for at, group in enumerate(groups) for run in group.runs}
    return sorted(
        group_runs(runs), key=lambda group: min(places.get(run.dir, len(places)) for run in group.runs)
    )


def _say_unplaced(order: Sequence[str], blocks: Sequence[ProblemBlock]) -> None:
    """A line for each word of ``--order`` that is no method and no value of a setting."""
    arms = [(block, arm) for block in blocks for arm in block.setting.arms]
    known = dict.fromkeys(name for _, arm in arms for name in (arm.group.method, arm.name))
    values = {
        str(v) for b, arm in arms for v in (*b.setting.differing.values(), *arm.group.settings.values())
    }
    for word in order:
        if word not in known and word not in values:
            print(f"fedsim: --order {word}: nothing is called so{hint(word, known)}", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    if args.set and not args.system:
        raise ConfigError("--set: only with --system")
    if args.exclude and not args.system:
        raise ConfigError("--exclude: only with --system; without it type fedsim forget RUN --client K")
    if args.target is not None and not 0 <= args.target <= 1:
        raise ConfigError(f"--target {args.target:g}: must be in [0, 1], as accuracies are")


def _priced(args: argparse.Namespace, runs: Sequence[Run]) -> Sequence[Run]:
    """The runs, with the times of another system if one is asked for."""
    if not args.system:
        return runs
    from fedsim.run.whatif import check_never_asked, compose_system, reprice

    system = compose_system(args.system, args.set)
    check_runs([run.dir for run in runs], args.allow)
    for run in runs:
        check_never_asked(run, args.exclude)
    return [reprice(run, system) for run in runs]


def _parser() -> Arguments:
    parser = Arguments(prog="fedsim report", description=(report.__doc__ or "").partition("\n")[0])
    add_choices(parser)
    add = parser.add_argument
    add("--target", type=float, help="accuracy in 0..1 whose first crossing is reported")
    add(
        "--out",
        type=place,
        metavar="DIR",
        help="where to write report.html; default: report/ beside the runs",
    )
    add(
        "--system",
        metavar="FILE",
        help="price the runs on other devices: an option's name or a YAML file like one",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of that system, e.g. system.traces=DIR",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        type=int,
        default=[],
        metavar="K",
        help="price them without client K, if it was never asked for anything",
    )
    add(
        "--columns",
        metavar="C,...",
        help="in place of the usual ones: seconds, best_test, or any of metrics.jsonl",
    )
    add(
        "--pivot",
        nargs=2,
        metavar=("ROW", "COL"),
        help="settings down and across, e.g. method partition.alpha",
    )
    add("--order", metavar="A,B,...", help="of methods, or of a pivot's rows and columns")
    add(
        "--curves",
        metavar="METRIC,...",
        help="further figures; diff: differences to the reference against rounds",
    )
    add("--format", choices=FORMATS, help="print the table so, and nothing else")
    add_allow(parser)
    add_serving(parser)
    return parser


def _document(
    blocks: Sequence[ProblemBlock], plan: ComparisonPlan, command: Sequence[str], dirs: Sequence[Path]
) -> str:
    from fedsim.report.comparison import document, to_text
    from fedsim.run.key import version

    return to_text(document(blocks, plan, command, dirs, version()))


def _tables(
    args: argparse.Namespace,
    frame: Any,
    blocks: Sequence[ProblemBlock],
    plan: ComparisonPlan,
    order: Sequence[str],
) -> Any:
    """Titles and tables: the pivot's, or the one of all arms."""
    from fedsim.report.pivot import pivot
    from fedsim.report.tables import layout

    if not args.pivot:
        return [("", layout(frame))]
    row, column = args.pivot
    return pivot(blocks, plan, row, column, order)


def _printed(
    args: argparse.Namespace,
    frame: Any,
    blocks: Sequence[ProblemBlock],
    plan: ComparisonPlan,
    order: Sequence[str],
) -> str:
    from fedsim.report.latex import to_latex
    from fedsim.report.tables import to_csv, to_markdown

    if args.format == "csv":
        return to_csv(frame)
    title = "\n**{}**\n\n" if args.format == "md" else "% {}\n"
    write = to_markdown if args.format == "md" else to_latex
    tables = _tables(args, frame, blocks, plan, order)
    return "".join((title.format(name) if name else "") + write(table) for name, table in tables)


def _show(
    args: argparse.Namespace,
    frames: Sequence[Any],
    blocks: Sequence[ProblemBlock],
    plan: ComparisonPlan,
    order: Sequence[str],
) -> None:
    from fedsim.report import print_table
    from fedsim.report.tables import show_text

    if args.pivot:
        for name, table in _tables(args, frames[0], blocks, plan, order):
            print(name)
            show_text(table)
        return
    for frame in frames:
        print_table(frame)


def _write(frame: Any, out: Path) -> None:
    """The table of the clients' own numbers, beside that of the test set."""
    from fedsim.report.latex import to_latex
    from fedsim.report.tables import layout, to_csv

    (out / "table-clients.csv").write_text(to_csv(frame), encoding="utf-8")
    (out / "table-clients.tex").write_text(to_latex(layout(frame)), encoding="utf-8")


def _curves(
    args: argparse.Namespace, blocks: Sequence[ProblemBlock], plan: ComparisonPlan, out: Path
) -> list[Path]:
    if not args.curves:
        return []
    from fedsim.report.metriccurves import draw_metric, file_of

    drawn = []
    for metric in words_of(args.curves):
        path = out / file_of(metric)
        path.write_bytes(draw_metric(blocks, plan, metric))
        drawn.append(path)
    return drawn


def _sweeps(runs: Sequence[Run]) -> list[str]:
    """The commands of the latest sweeps into the folders of these runs, as Hydra noted them."""
    commands = []
    for parent in dict.fromkeys(run.dir.parent for run in runs):
        with suppress(OSError, OmegaConfBaseException, YAMLError):
            noted = OmegaConf.select(OmegaConf.load(parent / "multirun.yaml"), "hydra.overrides.task")
            commands.append(shlex.join(["fedsim", "-m", *map(str, noted or ())]))
    return commands
