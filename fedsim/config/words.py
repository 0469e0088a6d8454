"""Settings as they are typed: what Hydra would misread is put in quotes, what cannot be meant is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import RangeSweep
from hydra.errors import HydraException

from fedsim.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
# Names, kept as they were typed: 1e5 is no number there, nor is 007
TEXTS = frozenset({"name", "out", "dir", "method", "tracker.wandb.project", "tracker.wandb.entity"})
# Settings that go beside those of any option of a group: Hydra knows no key that an option does not have
OF_ANY_OPTION = frozenset({"model.head"})
_UNQUOTED = re.compile(r"[\w/\-\\+.$%*@?|:\s]*", re.ASCII)  # what Hydra reads without quotes
_STRUCTURE = re.compile(r"""['"\[\]{}()]""")  # lists, mappings, functions, or quoted already


def readable(overrides: Sequence[str]) -> list[str]:
    """``overrides`` as Hydra reads them in the way they are meant.

    Names are text, whatever they look like (``name=1e5``); ``~/`` is the home folder; values with characters that mean
    something to Hydra (``dir=a=b``, ``name=Übung``) are put in quotes.

    Raises:
        ConfigError: for several options of a group in brackets, of which Hydra would take the last.
    """
    for before, after in pairwise(overrides):
        if ("=" not in before and after.startswith("=")) or (before.endswith("=") and "=" not in after):
            key, value = before.rstrip("="), after.lstrip("=") or "VALUE"
            raise ConfigError(f"{before} {after}: write {key}={value}, without spaces")
    return [_quoted(override) for override in overrides]


def refuse_twice(overrides: Sequence[str], several: str | None = None) -> None:
    """Refuse a key that is given two values, of which Hydra would take the last.

    ``several`` says what values beside each other are, where they may be (``-m for a run of each``).

    Raises:
        ConfigError: naming both, and what to type.
    """
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.lstrip("+").replace("/", ".")
        if not equals or key.startswith("~"):
            continue
        if (before := given.setdefault(name, value)) != value:
            both = "" if several is None else f", or {name}={before},{value} {several}"
            raise ConfigError(
                f"{name}={before} and {key}={value}: one setting typed twice; type one of them{both}"
            )


def last_of_each(settings: Sequence[str]) -> list[str]:
    """Settings that were put together from several lists, without those that a later one of the same key replaces."""
    return list({o.partition("=")[0].lstrip("+") if "=" in o else o: o for o in settings}.values())


def refuse_empty(overrides: Sequence[str]) -> None:
    """Refuse a sweep over a range without values, of which no run would come."""
    for override in overrides:
        if "range(" not in override:
            continue
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            continue  # said when it is composed
        sweep = parsed.value()
        if isinstance(sweep, RangeSweep) and (not sweep.step or not len(list(sweep.range()))):
            raise ConfigError(f"{override}: holds no value; seed=range(3) gives 0, 1 and 2")


def _quoted(override: str) -> str:
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if not equals:
        return override
    if key in OF_ANY_OPTION:
        key = f"++{key}"
    if not name:
        raise ConfigError(f"{override!r}: a setting is written key=value")
    if value.startswith("[") and "." not in name and (CONF / name.partition("@")[0]).is_dir():
        options = value.strip("[]").replace(" ", "")
        way = f"a sweep over several is -m {name}={options}" if "," in options else f"type {name}={options}"
        raise ConfigError(f"{override}: a run has one option of a group; {way}")
    if _STRUCTURE.search(value):
        return f"{key}={value}"
    return f"{key}={','.join(_word(name, part) for part in value.split(','))}"


def _word(key: str, text: str) -> str:
    """One value, in quotes if Hydra could not read it, or would take a name for a number."""
    if text.startswith("~/"):
        text = str(Path(text).expanduser())
    looks_like_number = key in TEXTS and (text.lower() in ("true", "false") or _is_number(text))
    if looks_like_number or (not _UNQUOTED.fullmatch(text) and not text.endswith("\\")):
        return f"'{text.strip()}'"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
