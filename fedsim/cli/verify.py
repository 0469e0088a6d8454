"""``fedsim verify``: a run computed again, serially, and compared round by round."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError

from fedsim.cli.arguments import Arguments, add_allow, folder, place
from fedsim.cli.asjson import aside
from fedsim.config.allowed import check_allowed, granted, listed
from fedsim.config.check import validate
from fedsim.config.compose import load, plain
from fedsim.errors import ConfigError
from fedsim.exchange.ledger import FILE as LEDGER
from fedsim.replay.again import as_simulation
from fedsim.replay.recorded_files import differing_files
from fedsim.run.key import version
from fedsim.server.weightsfile import LAST
from fedsim.task.frozen import FrozenBase, reference
from fedsim.tracking.rows import read_rows, rows_of


def verify(argv: Sequence[str]) -> int:
    """Compute a run again, serially and from scratch, and compare the weights of every round.

    A deployment is simulated on its recorded cohorts, without the clients that did not answer.

    Where all rounds agree, weights, checkpoints, summary and what was measured are compared too (of a deployment, and
    where a run ended early, only with what they say themselves).

    Returns 0 if the hash of the weights agrees in every recorded round and no file is damaged, else 1.
    """
    parser = Arguments(prog="fedsim verify", description=(verify.__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=place, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--json", action="store_true", help="print what verify.schema.json says, and nothing else"
    )
    add_allow(parser)
    args = parser.parse_args(argv)
    with granted(listed(" ".join(args.allow), "--allow")):
        return _verify(args)


def _verify(args: Namespace) -> int:
    recorded_dir, edited = folder(args.run), list[str]()
    recorded = _hashes(recorded_dir)
    _check_whole(recorded_dir)
    with tempfile.TemporaryDirectory(prefix="fedsim-verify-") as again_dir:
        recorded_config = load(recorded_dir / "config.yaml")
        check_allowed(recorded_config)
        objects = [k for k in ("strategy", "model", "data") if "given" in (recorded_config.get(k) or {})]
        if objects:
            raise ConfigError(
                f"{recorded_dir}: {' and '.join(objects)} of this run were handed over in Python; to verify it, call "
                "simulate again with the same arguments and compare the weights_hash of the rounds"
            )
        _check_base(recorded_dir, recorded_config)
        config = as_simulation(recorded_config, again_dir)
        validate(config)
        if recorded_config.code:
            edited = _edited(recorded_config)
        if edited and not args.json:
            print(f"edited since: the code of {', '.join(edited)}, which now may compute other weights")
        from fedsim.api import run
        from fedsim.flower.replay import DeploymentRecord, ReplayEngine

        handed: dict[str, Any] = {}
        if (record := DeploymentRecord.of(recorded_dir)) is not None:
            whole = len(record.cohorts) >= config.rounds
            handed = {"engine": ReplayEngine(record), "cohorts": record.cohorts if whole else None}
        with aside(args.json):
            computed = run(config, **handed).dir
        again, base = _hashes(computed), _base(computed)
        differing = next((number for number, value in recorded.items() if again.get(number) != value), None)
        whole = record is None and max(recorded) == max(again)
        files = {} if differing is not None else differing_files(recorded_dir, computed, whole=whole)
    if args.json:
        document = _document(recorded_dir, recorded, again, differing, edited, files)
        print(json.dumps(document, indent=1, sort_keys=True))
    elif differing is None:
        print(f"{len(recorded)} rounds identical")
        for name, why in files.items():
            print(f"{recorded_dir / name} {why}")
    else:
        value, found = recorded[differing], again.get(differing, "nothing")
        print(f"round {differing} differs: recorded {value}, computed {found}")
        if (then := _base(recorded_dir)) != base:
            print(f"its base was {then or 'trained as a whole'}; in model.path lies {base or 'none'}")
        print(why_other_bits(recorded_dir, differing, recorded_config))
    return 0 if differing is None and not files else 1


def _check_base(run: Path, config: DictConfig) -> None:
    """Refuse a run whose model was built on weights in a folder that is gone: nothing else holds them."""
    path = config.model.get("path")
    if isinstance(path, str) and not Path(path).expanduser().is_dir():
        base = _base(run)
        what = f"the base {base}" if base else "the weights that it began with"
        raise ConfigError(
            f"{run}: {what} lay in model.path={path}, which is gone, and the run has no copy; put the folder back there"
        )


def _base(run: Path) -> FrozenBase | None:
    """The frozen base that the weights of a run refer to, if they do."""
    with suppress(OSError, SafetensorError):
        return reference(run / LAST)
    return None


def _document(
    run: Path,
    recorded: Mapping[int, str],
    again: Mapping[int, str],
    differing: int | None,
    edited: Sequence[str],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """As ``verify.schema.json`` says; it ships beside this module."""
    first = None
    if differing is not None:
        first = {"round": differing, "recorded": recorded[differing], "computed": again.get(differing)}
    return {
        "schema": 1,
        "fedsim": version(),
        "run": run.resolve().name,
        "rounds": len(recorded),
        "identical": differing is None and not files,
        "first_difference": first,
        "edited": list(edited),
        "files": dict(files),
    }


def _from_os(run: Path) -> bool:
    """Whether the ledger says that noise is not drawn from the seed, as is usual in deployments."""
    with suppress(OSError, ValueError):
        return any(line.get("noise") == "os" for line in read_rows(run / LEDGER))
    return False


def why_other_bits(run: Path, number: int, config: DictConfig) -> str:
    """What of machine, versions or code is not what it was when a round was recorded; or why no round repeats."""
    from fedsim.run.machine import difference, machine
    from fedsim.run.provenance import entry_of

    if _from_os(run):
        return "its noise was drawn by the operating system (privacy.noise=os): such a run does not repeat bit by bit"
    if (then := entry_of(run, number)) is None:
        return "where it was recorded is not known: it has no provenance.json"
    found = difference(then, machine(config.engine.threads, str(config.engine.device)))
    return found or "recorded on a machine like this one, with the same versions and code"


def _hashes(run: Path) -> dict[int, str]:
    """Weights hash of each round of ``metrics.jsonl``, in order of rounds."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        unfinished = (run / "checkpoint").is_dir()
        way = "; it has a checkpoint, from which the run's own command goes on" if unfinished else ""
        raise ConfigError(f"{run}: no run folder: it has no metrics.jsonl{way}")
    rows = [row for row in read_rows(path) if row.get("weights_hash")]
    if bad := [row for row in rows if not isinstance(row.get("round"), int)]:
        raise ConfigError(f"{path}: round {bad[0].get('round')!r} is no number; the file was changed")
    if not rows:
        raise ConfigError(f"{path}: no finished round to compare")
    return {row["round"]: str(row["weights_hash"]) for row in sorted(rows, key=lambda row: row["round"])}


def _check_whole(run: Path) -> None:
    """Refuse a record that lacks rounds which were finished: what is left would be called identical."""
    summary: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        summary = json.loads((run / "summary.json").read_text())
    if isinstance(summary, dict) and summary.get("status") == "done" and type(summary.get("rounds")) is int:
        rows_of(run, summary["rounds"])


def _edited(recorded: DictConfig) -> list[str]:
    """Keys of the user's targets whose code is not what it was."""
    from fedsim.run.resolve import code_of

    now = code_of(plain(recorded))
    return [key for key, code in recorded.code.items() if now.get(key) != code]
