"""Arguments of the commands that take paths and flags; what is wrong with them is said in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedsim.errors import ConfigError


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are ``ConfigError``."""

    def error(self, message: str) -> NoReturn:
        """One line, and where to read on."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def place(text: str) -> Path:
    """A path, ``~`` being the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path is empty")
    return Path(text).expanduser()


def folder(path: Path) -> Path:
    """``path``, if it is a folder that can be looked into.

    Raises:
        ConfigError: saying what it is instead.
    """
    try:
        if path.is_dir():
            next(path.iterdir(), None)
            return path
        if path.exists():
            raise ConfigError(f"{path}: a file, not a folder; type {path.parent}")
    except (OSError, ValueError) as error:  # no permission, a name that is none
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    raise ConfigError(f"{path}: no such folder")


def add_allow(parser: Arguments) -> None:
    """The flag of commands that build what a run folder names, which may come from elsewhere."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="MODULE",
        help="code of yours, a module or my.module.Class, that the run may name; also FEDSIM_ALLOW",
    )


def check_runs(runs: Sequence[Path], allow: Sequence[str]) -> None:
    """Refuse run folders that name what is not on the list (``fedsim.config.allowed``); nothing of them is built.

    Raises:
        ConfigError: naming the folder and the key.
    """
    from fedsim.config.allowed import check_allowed, granted, listed
    from fedsim.config.compose import load

    with granted(listed(" ".join(allow), "--allow")):
        for run in runs:
            config = folder(run) / "config.yaml"
            if config.is_file():  # what else is missing is said by who needs it
                try:
                    check_allowed(load(config))
                except ConfigError as error:
                    raise ConfigError(f"{run}: {error}") from None
