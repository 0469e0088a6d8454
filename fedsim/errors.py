"""Errors that users meet, and the checks that raise them: what was wrong, what was given, what to type instead."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("clients", "conf", "strategies")  # of fedsim, beside ``fedsim``


class FedsimError(Exception):
    """Base of every error that fedsim raises on purpose."""


class ConfigError(FedsimError):
    """A setting is unknown, of the wrong type or impossible (exit code 2)."""


class DataError(FedsimError):
    """A data file, source or partition cannot be used (exit code 2)."""


class NoSamplesError(DataError):
    """Data that are there and hold nothing (exit code 2)."""


class ClientError(FedsimError):
    """A client's own code raised, or returned something unusable (exit code 1)."""


class StrategyError(FedsimError):
    """A strategy's own code wrote to what it was given, or returned something unusable (exit code 1)."""


class CallbackError(FedsimError):
    """A callback's own code raised; what it raised is the cause (exit code 1)."""


class CheckpointError(FedsimError):
    """A checkpoint is damaged, incomplete, belongs to another run, or cannot be written (exit code 2)."""


class EngineError(FedsimError):
    """Workers could not be started or were lost for good (exit code 1)."""


class LockedError(ConfigError):
    """Another process is writing the run's ``folder`` (exit code 2)."""

    def __init__(self, folder: Path):
        super().__init__(f"{folder}: another process is writing this run; wait for it, or give dir=...")
        self.folder = folder


class TooFewUpdates(FedsimError):  # noqa: N818 - what became of a round, before anybody calls it an error
    """Fewer updates came than the aggregator can work with: the round is thin, see ``failures.thin_round``."""


class ThinRoundError(FedsimError):
    """A round had too few updates for the aggregator, and ``failures.thin_round=stop``; or no round of the run had any
    that counted (exit code 1)."""


class ArgumentError(ConfigError, ValueError):
    """An argument of a pure function is impossible: a ``ValueError`` for who calls it, exit code 2 in a run."""


def check_setting(section: str, ok: bool, key: str, value: object, expected: str) -> None:
    """Refuse an impossible value of ``section.key``: ``strategy.rho=-1: must be positive``."""
    if not ok:
        raise ConfigError(f"{section}.{key}={value}: {expected}")


def check_choice(key: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a value that is none of those allowed, naming the nearest one."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(allowed)}{hint(str(value), allowed)}")


def returned(owner: object, method: str, found: object, expected: str, part: str = "") -> str:
    """What to say where the code of users returned the wrong thing; ``part`` of it, if not all."""
    what = "None" if found is None else f"{type(found).__name__}"
    if (shape := getattr(found, "shape", None)) is not None:
        what += f" of shape {tuple(shape)}"
    forgotten = "; is there a return at its end?" if found is None and not part else ""
    return f"{type(owner).__name__}.{method} returned {part and part + ' as '}{what}, expected {expected}{forgotten}"


OWN = Path(__file__).resolve().parents[1]  # where fedsim, clients, conf and strategies lie


def shadow(folder: Path | None = None) -> str | None:
    """What hides one of fedsim's packages from Python, and the remedy; ``None`` if all is well.

    ``folder``: one that other processes will look into first, as Ray's workers do into the working directory.
    """
    if folder is not None:
        files = (f for n in ("fedsim", *PACKAGES) for f in (folder / f"{n}.py", folder / n / "__init__.py"))
        return None if folder.resolve() == OWN else next((_hidden(f) for f in files if f.exists()), None)
    for name in PACKAGES:
        try:
            found = find_spec(name)
        except ValueError:  # a module made by hand
            continue
        if found is not None and found.origin and Path(found.origin).resolve() != OWN / name / "__init__.py":
            return _hidden(Path(found.origin))
    return None


def _hidden(file: Path) -> str:
    theirs = file.parent if file.name == "__init__.py" else file
    return f"the package {theirs.stem!r} of fedsim ({OWN / theirs.stem}) is hidden by {theirs}; rename {theirs.name}"


def headline(text: str) -> str:
    """The line of a message or traceback that says what happened, neither a frame of it nor the advice below it.

    ``client 3 failed in round 2: ValueError: boom`` of a message that holds the client's traceback; of several
    tracebacks the last.
    """
    lines = text.strip().splitlines() or ["no reason given"]
    starts = [at for at, line in enumerate(lines) if "Traceback" in line and line.endswith(":")]
    if not starts:
        return lines[0].strip()
    before = lines[starts[0]].partition("Traceback")[0]
    said = next((line for line in lines[starts[-1] + 1 :] if line and not line[0].isspace()), lines[-1])
    return before + said.strip()


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``word``, or None if none is like it."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(candidates), 1, 0.6)), None)


def hint(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """``"; nearest is 'x'"`` (with ``prefix`` before the x), or nothing."""
    found = nearest(word, candidates)
    return f"; nearest is {prefix + found!r}" if found else ""
