"""Turn Hydra's and OmegaConf's errors into one line that names the key and the nearest valid one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from traceback import walk_tb

from hydra.errors import (
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsim.config.keys import known_keys, misplaced, refusal
from fedsim.config.textfile import OtherEncodingError, text_of
from fedsim.config.yamlfile import broken
from fedsim.errors import FedsimError, hint

_CONVERT = re.compile(
    r"Value '(?P<value>.*)' of type '(?P<type>\w+)' could not be converted to (?P<want>\w+)"
)
_WANTED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
COMMANDS = (
    "report",
    "compare",
    "tune",
    "verify",
    "diff",
    "value",
    "forget",
    "audit",
    "export",
    "ls",
    "rm",
    "deploy",
)
# What Hydra and OmegaConf raise, with texts of no use, where a setting lies below a value or below nothing
UNSAID = (AssertionError, AttributeError)


def _being_read(error: BaseException) -> str:
    """The option's file that Hydra was reading; it gives its name in no other way."""
    frames = [frame.f_locals for frame, _ in walk_tb(error.__traceback__)]
    return next((str(f["full_path"]) for f in reversed(frames) if "full_path" in f), "")


def _other_encoding(error: UnicodeDecodeError) -> str:
    try:
        text_of(error.object)
    except OtherEncodingError as other:
        return str(other)
    return str(error)


def explain(error: Exception, overrides: Sequence[str] = ()) -> str:
    """One line on what is wrong with the configuration, and what to write instead.

    Raises:
        Exception: ``error`` itself, if it is of none of the libraries' own kinds and no setting explains it.
    """
    if isinstance(error, UNSAID) and not isinstance(error, OmegaConfBaseException):
        if (text := misplaced(overrides)) is None:
            raise error
        return text
    if isinstance(error, OverrideParseException):
        return _unreadable(error, overrides)
    if isinstance(error, InstantiationException):
        return _constructor(error, overrides)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _option(error)
    if isinstance(error, YAMLError):
        return broken(error)
    if isinstance(error, UnicodeDecodeError):
        return f"{_being_read(error) or 'a configuration file'}: {_other_encoding(error)}"
    text = str(error)
    if "Ambiguous value for argument" in text:
        return f"{_quoted(text)}: several values need a sweep; add -m"
    if unknown := re.match(r"Could not override '([^']*)'", text):
        return refusal(unknown.group(1).split("@")[0].replace("/", "."), overrides)
    if "requires --multirun" in text:
        return f"{_quoted(text)}: several values need a sweep; add -m"
    if "Config group override must be" in text:
        empty = [o for o in overrides if o.endswith("=null")]
        return f"{' '.join(empty) or text}: a group needs the name of one of its options"
    if "Multiple values for " in text:
        return f"{text.split('.', 1)[0].splitlines()[0]}: write it once, and without '+'"
    for cause in _chain(error):
        if isinstance(cause, OmegaConfBaseException):
            return _value(cause, overrides)
    return " ".join(text.split())


def _value(error: OmegaConfBaseException, overrides: Sequence[str]) -> str:
    """A value of the wrong type, an unknown key in a file, or a broken interpolation."""
    first = str(error).splitlines()[0]
    key = error.full_key or str(error.key or "configuration")
    if wrong := _CONVERT.match(first):
        value, wanted = wrong["value"], _WANTED.get(wrong["want"], f"of type {wrong['want']}")
        several = value.strip("[]").replace(" ", "") if value.startswith("[") else ""
        way = f"; a sweep over several is -m {key}={several}" if "," in several else ""
        return f"{key}={value}: must be {wanted}{way}"
    if bool_ := re.match(r"Value '(.*)' is not a valid bool", first):
        return f"{key}={bool_[1]}: must be true or false"
    if "Invalid type assigned" in first:
        return f"{key}: holds further settings; type {key}.NAME=VALUE"
    if "is not a ListConfig" in first or "with ListConfig" in first:
        return f"{key}: must be a list, such as {key}=[...]"
    if "is not Optional" in first:
        return f"{key}=null: must not be null"
    if "to string" in first and (wrong := re.match(r"Cannot convert '(\w+)' to string: '(.*)'$", first)):
        return f"{key}={wrong[2]}: must be text"
    if "not in" in first and error.full_key:
        return refusal(key, overrides)
    return f"{key}: {first}"


def _unreadable(error: OverrideParseException, overrides: Sequence[str]) -> str:
    first, given = str(error.message).splitlines()[0], str(error.override)
    if "missing EQUAL" in error.message:
        after = [o.lstrip("=") for a, o in pairwise(overrides) if a == given and "=" not in o.lstrip("=")]
        way = f"{given}={after[0]}" if after and given in known_keys() else "key=value"
        near = hint(given, COMMANDS)
        return f"{given!r} is neither a command (fedsim --help names them{near}) nor a setting: write {way}"
    if colon := re.fullmatch(r"([\w.]+):(\S+)", given, re.ASCII):
        return f"cannot read the setting {given!r}: type {colon[1]}={colon[2]}"
    key, _, value = given.partition("=")
    if value.endswith(",") or value.startswith(","):
        return f"{given}: a value is missing beside a comma; type {key}={value.strip(',')}"
    if not re.fullmatch(r"[\w@./:~+-]+", key, re.ASCII):
        return f"cannot read the setting {given!r}: write key=value, without spaces around the '='"
    odd = next((c for c in value if not c.isascii() or c in "~=!#&;<>^`'"), "")
    where = f"{odd!r}" if odd else first.partition(":")[0]
    return f"cannot read the setting {given!r}: {where}; quote values that hold special characters"


def _option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return f"no such configuration file: {option!r}"
    near = hint(option, error.options or ())
    known = f" (there are: {', '.join(error.options)})" if error.options and not near else ""
    return f"{group}={option}: no such option{near}{known}"


def _constructor(error: InstantiationException, overrides: Sequence[str]) -> str:
    """What a part's own constructor refused; its words, with the key of the part."""
    lines = str(error).splitlines()
    where = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    causes = [c for c in _chain(error) if c is not error]
    for cause in causes:
        if isinstance(cause, FedsimError):
            return str(cause)
    text = " ".join(str(causes[-1] if causes else lines[0]).split())
    if lines[0].startswith("Error locating target"):
        return f"{where}._target_={_quoted(lines[0])}: cannot be imported: {text}"
    if "unexpected keyword argument" in text:
        return refusal(f"{where}.{_quoted(text)}", overrides)
    return f"{where}: {text}" if where else text


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _quoted(text: str) -> str:
    found = re.search(r"'([^']*)'", text)
    return found.group(1) if found else text
