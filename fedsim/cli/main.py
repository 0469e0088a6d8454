"""The ``fedsim`` command: runs, sweeps, reports, checks, exports, deployments. ``fedsim --help`` says how to use it.

This module imports nothing heavy, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from fedsim.cli.exits import DONE, guarded
from fedsim.errors import ConfigError, shadow

# glibc reads the malloc variables at process start only. With them, freed activations are kept for the next
# batch instead of going back to the system and being faulted in again: 13-23 % less wall time was measured on
# convolutional nets. OMP_NUM_THREADS keeps libraries imported before torch from starting a thread per core
# (torch's own number is engine.threads). The Ray variables stop usage reports and a warning at each start.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

REPLAY = ("diff", "value", "forget", "audit")  # commands that each lie in a module of their name


def main() -> int:
    """Console script: set up the process, then do what the arguments say. Returns the exit code."""
    _prepare_process()
    return command(sys.argv[1:])


def command(argv: Sequence[str]) -> int:
    """What ``fedsim ARGV...`` does, in this process; errors are printed, the exit code is returned."""
    return guarded(lambda: _dispatch(list(argv)), argv)


def _prepare_process() -> None:
    """Set :data:`ENVIRONMENT` where the user has not; start over once if malloc could not see it."""
    malloc = [key for key in ENVIRONMENT if key.startswith("MALLOC_")]
    again = sys.platform == "linux" and any(key not in os.environ for key in malloc)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    sys.path.append(str(Path.cwd()))  # where `_target_: my_method.MyMethod` is looked for last
    if again:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _dispatch(argv: list[str]) -> int:
    if (hidden := shadow()) is not None:
        raise ConfigError(hidden)
    if argv == ["--version"]:
        from importlib.metadata import version

        print(f"fedsim {version('fedsim-lab')}")
        return DONE
    if argv[:1] == ["report"]:
        from fedsim.cli.report import report

        return report(argv[1:])
    if argv[:1] == ["compare"]:
        from fedsim.cli.compare import compare

        return compare(argv[1:])
    if argv[:1] == ["verify"]:
        from fedsim.cli.verify import verify

        return verify(argv[1:])
    if argv[:1] == ["export"]:
        from fedsim.cli.export import export

        return export(argv[1:])
    if argv[:1] == ["tune"]:
        from fedsim.cli.tune import tune

        return tune(argv[1:])
    if argv[:1] in (["ls"], ["rm"]):
        from fedsim.cli import storage

        return storage.ls(argv[1:]) if argv[0] == "ls" else storage.rm(argv[1:])
    if argv[:2] == ["deploy", "check"]:  # before each start of a node: nothing heavy
        return int(import_module("fedsim.flower.reach").check(argv[2:]))
    if argv[:1] in (["deploy"], ["provision"]):
        return _on_flower(argv[0], argv[1:])
    if argv and argv[0] in REPLAY:
        return int(getattr(import_module(f"fedsim.cli.{argv[0]}"), argv[0])(argv[1:]))
    if "--help" in argv or "-h" in argv or argv == ["help"]:
        from fedsim.cli.help import help_text

        print(help_text(argv))
        return DONE
    from fedsim.cli.launch import launch

    return launch(argv)


def _on_flower(what: str, argv: list[str]) -> int:
    if find_spec("flwr") is None:
        raise ConfigError("deployments need Flower; type: pip install 'fedsim-lab[flower]'")
    return int(getattr(import_module(f"fedsim.flower.{what}"), what)(argv))
