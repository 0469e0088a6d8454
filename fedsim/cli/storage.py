"""``fedsim ls`` and ``fedsim rm``: what lies on disk, how it ended and what it takes; and how to be rid of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.cli.arguments import Arguments, folder, place
from fedsim.cli.exits import DONE, FAILED
from fedsim.errors import ConfigError, LockedError

if TYPE_CHECKING:
    from fedsim.run.holdings import Holding

UNITS = ("B", "kB", "MB", "GB", "TB")


def ls(argv: Sequence[str]) -> int:
    """List runs and what they share on disk, with status and size."""
    parser = Arguments(prog="fedsim ls", description=ls.__doc__)
    parser.add_argument(
        "dirs", nargs="*", type=place, metavar="DIR", help="default: runs, and the cache of samples"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args(argv)
    dirs = [folder(path) for path in args.dirs]
    from fedsim.run.holdings import holdings

    if not args.dirs:
        dirs = [Path("runs")]
    found = [h for i, path in enumerate(dirs) for h in holdings(path, cache=not args.dirs and i == 0)]
    if args.json:
        print(
            json.dumps(
                {"schema": 1, "holdings": [_facts(h) for h in found], "bytes": _total(found)}, indent=1
            )
        )
        return DONE
    for line in _table(found):
        print(line)
    return DONE


def rm(argv: Sequence[str]) -> int:
    """Remove runs, whole sweeps, or what runs share. A run under way stays."""
    parser = Arguments(prog="fedsim rm", description=rm.__doc__)
    parser.add_argument(
        "dirs", nargs="+", type=place, metavar="DIR", help="a run, a folder of runs, or a store"
    )
    parser.add_argument(
        "--status", metavar="WORD,...", help="only runs that ended so, as in failed,interrupted,killed"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and stop")
    parser.add_argument("--json", action="store_true", help="say what was removed as JSON")
    args = parser.parse_args(argv)
    found = _chosen([folder(path) for path in args.dirs], args.status)
    if args.json and not (args.yes or args.dry_run):
        raise ConfigError("fedsim rm --json: cannot ask; add --yes")
    if not args.json:
        for line in _table(found):
            print(line, flush=True)
    removed, kept = list[Any](), list[tuple[Any, str]]()
    if not args.dry_run and found and (args.yes or _agreed(found)):
        removed, kept = _removed(found, args.dirs)
    if args.json:
        facts = {
            "removed": [_facts(h) for h in removed],
            "kept": [{**_facts(h), "reason": r} for h, r in kept],
        }
        if args.dry_run:
            facts["would_remove"] = [_facts(h) for h in found]
        print(json.dumps({"schema": 1, **facts, "bytes": _total(removed)}, indent=1))
    elif removed:
        print(f"removed: {len(removed)}, {_size(_total(removed))}")
    for holding, reason in kept:
        print(f"not removed: {holding.folder}: {reason}", file=sys.stderr)
    return FAILED if kept else DONE


def _chosen(dirs: Sequence[Path], status: str | None) -> list[Holding]:
    """What lies in ``dirs``, of the runs those with one of the words in ``status``.

    Raises:
        ConfigError: for a folder in which there is nothing of fedsim's; for the home folder and those above the
            working directory, in which runs of others may lie.
    """
    from fedsim.run.holdings import STATUS, holdings

    words = status.split(",") if status else STATUS
    if wrong := [word for word in words if word not in STATUS]:
        raise ConfigError(f"--status {wrong[0]}: choose of {', '.join(STATUS)}")
    found: dict[Path, Holding] = {}
    for path in dirs:
        at, here = path.resolve(), Path.cwd().resolve()
        if at in (Path(at.anchor), Path.home().resolve(), *here.parents):
            raise ConfigError(
                f"{path}: holds more than one project's runs, so nothing is removed; name a folder of runs "
                f"(fedsim ls {path} lists them)"
            )
        held = list(holdings(path, cache=False))
        if not held:
            raise ConfigError(f"{path}: no run, no folder of runs and no store of fedsim; nothing is removed")
        found |= {
            h.folder.resolve(): h for h in held if not status or (h.kind == "run" and h.status in words)
        }
    return list(found.values())


def _agreed(found: Sequence[Holding]) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("fedsim rm: nobody can be asked here; add --yes")
    answer = input(f"remove these {len(found)}, {_size(_total(found))}? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _removed(
    found: Sequence[Holding], dirs: Sequence[Path]
) -> tuple[list[Holding], list[tuple[Holding, str]]]:
    from fedsim.run.holdings import remove, tidy

    removed, kept = list[Any](), list[tuple[Any, str]]()
    for holding in found:
        try:
            remove(holding)
            removed.append(holding)
        except LockedError:
            kept.append((holding, "another process is at work in it"))
        except OSError as error:
            kept.append((holding, str(error)))
    for path in dict.fromkeys([*(h.folder.parent for h in removed if h.kind == "run"), *dirs]):
        if left := tidy(path):
            print(f"left in {path}: {', '.join(p.name for p in left)}", file=sys.stderr)
    return removed, kept


def _table(found: Sequence[Holding]) -> Iterable[str]:
    """A line each under the folder that they lie in, and the sums."""
    place: Path | None = None
    for h in found:
        if h.folder.parent != place:
            place = h.folder.parent
            yield f"{place}/"
        rounds = "" if h.kind != "run" else f"{h.rounds}/{h.planned if h.planned is not None else '?'}"
        yield f"  {h.folder.name:<44} {h.status:<12} {rounds:>11} {_size(h.bytes):>9}"
    for kind, name in (("run", "runs"), ("weights", "weights to start from"), ("cache", "cached samples")):
        of_kind = [h for h in found if h.kind == kind]
        if of_kind or kind == "run":
            yield f"{len(of_kind)} {name}, {_size(_total(of_kind))}"


def _facts(holding: Holding) -> dict[str, Any]:
    return {key: str(value) if key == "folder" else value for key, value in asdict(holding).items()}


def _total(found: Iterable[Holding]) -> int:
    return sum(h.bytes for h in found)


def _size(count: float) -> str:
    """``12.3 MB``."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
