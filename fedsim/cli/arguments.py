"""Arguments of the commands that take paths and flags; what is wrong with them is said in one line."""

from __future__ import annotations

import argparse
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
