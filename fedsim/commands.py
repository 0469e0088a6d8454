"""The subcommands: ``fedsim report`` and ``fedsim verify``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsim.config.check import validate
from fedsim.config.compose import load, plain, typed
from fedsim.config.schema import EngineConfig
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.report.runs import Run


def report(argv: Sequence[str]) -> int:
    """Compare all runs in the given folders: a table here; page, figures and table in a folder."""
    parser = argparse.ArgumentParser(prog="fedsim report", description=report.__doc__)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="run folder, or a folder of them")
    parser.add_argument("--target", type=float, help="accuracy in 0..1 whose first crossing is reported")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write report.html; default: report/ beside the runs"
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
    args = parser.parse_args(argv)
    if args.set and not args.system:
        raise ConfigError("--set: only with --system")
    for folder in args.dirs:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
    from fedsim.report import compare, group_runs, load_runs, print_table
    from fedsim.report.page import write_report

    runs = load_runs(args.dirs)
    if not runs:
        raise ConfigError(f"no run folder (with metrics.jsonl) in {', '.join(map(str, args.dirs))}")
    if args.system:
        from fedsim.run.whatif import compose_system, reprice

        system = compose_system(args.system, args.set)
        runs = [reprice(run, system) for run in runs]
    frame, out = compare(runs, args.target), args.out or _common(args.dirs) / "report"
    print_table(frame)
    page = write_report(
        group_runs(runs), frame, out, [*_sweeps(runs), shlex.join(["fedsim", "report", *argv])]
    )
    print(f"report:  {page}")
    print(f"tables:  {out / 'table.csv'}, {out / 'table.tex'}")
    print(f"figures: {out / '*.png'}", flush=True)
    return 0


def _sweeps(runs: Sequence[Run]) -> list[str]:
    """The commands of the latest sweeps into the folders of these runs, as Hydra noted them."""
    commands = []
    for folder in dict.fromkeys(run.dir.parent for run in runs):
        with suppress(OSError, OmegaConfBaseException, YAMLError):
            noted = OmegaConf.select(OmegaConf.load(folder / "multirun.yaml"), "hydra.overrides.task")
            commands.append(shlex.join(["fedsim", "-m", *map(str, noted or ())]))
    return commands


def show(dirs: Sequence[Path], draw: bool = True) -> None:
    """Print the table of the runs in ``dirs``, draw their curves, and say where everything lies.

    Without ``draw`` only curves that are there already are named.
    """
    from fedsim.report import compare, draw_curves, print_table
    from fedsim.report.runs import load_runs

    runs = load_runs(dirs)
    print_table(compare(runs))
    path = _common(dirs) / "curves.png"
    if draw:
        draw_curves(runs, path)
    for folder in dirs:
        print(f"results: {folder}")
    if path.exists():
        print(f"curves:  {path}", flush=True)


def _common(dirs: Sequence[Path]) -> Path:
    """The innermost folder that holds all of them, relative to the working directory if it lies there."""
    common = Path(os.path.commonpath([d.absolute() for d in dirs]))
    return common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common


def verify(argv: Sequence[str]) -> int:
    """Compute a run again, serially and from scratch, and compare the weights of every round.

    A deployment is simulated on its recorded cohorts, without the clients that did not answer.

    Returns 0 if the hash of the weights agrees in every recorded round, else 1.
    """
    parser = argparse.ArgumentParser(prog="fedsim verify", description=(verify.__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    recorded_dir: Path = parser.parse_args(argv).run
    recorded = _hashes(recorded_dir)
    with tempfile.TemporaryDirectory(prefix="fedsim-verify-") as folder:
        recorded_config = load(recorded_dir / "config.yaml")
        objects = [k for k in ("strategy", "model", "data") if "given" in (recorded_config.get(k) or {})]
        if objects:
            raise ConfigError(
                f"{recorded_dir}: {' and '.join(objects)} of this run were handed over in Python; to verify it, call "
                "simulate again with the same arguments and compare the weights_hash of the rounds"
            )
        config = _from_scratch(recorded_config, folder)
        validate(config)
        from fedsim.api import run
        from fedsim.flower.replay import Reality, ReplayEngine

        handed: dict[str, Any] = {}
        if (reality := Reality.of(recorded_dir)) is not None:
            whole = len(reality.cohorts) >= config.rounds
            handed = {"engine": ReplayEngine(reality), "cohorts": reality.cohorts if whole else None}
        again = _hashes(run(config, **handed).dir)
    for number, value in recorded.items():
        if again.get(number) != value:
            print(f"round {number} differs: recorded {value}, computed {again.get(number, 'nothing')}")
            return 1
    print(f"{len(recorded)} rounds identical")
    return 0


def _hashes(folder: Path) -> dict[int, str]:
    """Weights hash of each round of ``metrics.jsonl``, in order of rounds."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder}: no run folder: it has no metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    hashes = {int(row["round"]): str(row["weights_hash"]) for row in rows if row.get("weights_hash")}
    if not hashes:
        raise ConfigError(f"{path}: no finished round to compare")
    return dict(sorted(hashes.items()))


def _from_scratch(config: DictConfig, folder: str) -> DictConfig:
    """The same run on the serial engine, in another folder, telling nobody."""
    values = plain(config)
    values |= {"dir": folder, "resume": "never"}
    values["engine"] = {f.name: values["engine"][f.name] for f in dataclasses.fields(EngineConfig)}
    values["engine"] |= {"name": "serial", "workers": 1}
    values["tracker"]["console"]["mode"] = "quiet"
    values["tracker"]["wandb"]["mode"] = "disabled"
    values["tracker"]["tensorboard"] = False
    values["checkpoint"]["every"] = 0
    return typed(values)
