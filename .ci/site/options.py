"""Options of the configuration as tables: name, default and what the comment beside it says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from links import ROOT

CONF = ROOT / "conf"
LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.]+):(?: +(?P<value>\S.*?))??(?: +# +(?P<said>.*))?$")
BASE = re.compile(r" *- /(?P<group>\w+)@(?P<key>\w+): (?P<value>\w+)")
INSIDE = "another method inside this one"
PARENT = re.compile(r" *- (?P<name>[a-z]\w*)$|defaults: \[(?P<short>[a-z]\w*), _self_\]")


class Option(NamedTuple):
    """A setting of a part, its default as it is written, and what it means."""

    default: str
    meaning: str


@cache
def described(file: Path) -> str:
    """The comment at the head of a file."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def target(file: Path) -> str:
    """The class that a file names, or that the file which it goes on from does."""
    found = re.search(r"^_target_: (\S+)", file.read_text(), re.MULTILINE)
    return found[1] if found else target(_parents(file)[0])


@cache
def options(file: Path) -> dict[str, Option]:
    """By name (``sse.norm``: below a part), in the order of the file; what it goes on from comes first."""
    found: dict[str, Option] = {}
    for parent in _parents(file):
        found |= options(parent)
    inside: list[tuple[int, str]] = []
    last = ""
    for line in file.read_text().splitlines():
        if base := BASE.match(line):
            way = f"{INSIDE}: `{base['group']}@{file.parent.name}.{base['key']}=`"
            found[base["key"]] = Option(base["value"], way)
        elif last and line.startswith("#"):
            found[last] = found[last]._replace(meaning=f"{found[last].meaning} {line[1:].strip()}")
        elif (said := LINE.match(line)) and not said["key"].startswith(("defaults", "_")):
            indent = len(said["indent"])
            inside = [(deep, key) for deep, key in inside if deep < indent]
            last = ".".join([*(key for _, key in inside), said["key"]])
            if said["value"] is None:
                inside.append((indent, said["key"]))
                last = ""
            elif not (before := found.get(last, Option("", "")).meaning).startswith(INSIDE):
                found[last] = Option(said["value"], said["said"] or before)
    return found


def table(found: dict[str, Option], prefix: str = "") -> str:
    """A table of options, or a line that says there are none."""
    if not found:
        return "No options of its own.\n"
    rows = [
        f"| `{prefix}{name}` | {_code(option.default)} | {_cell(option.meaning)} |"
        for name, option in found.items()
    ]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) + "\n"


def settings() -> str:
    """The page of all settings: those of a run, and every option of every group."""
    parts = [
        "# Settings",
        "What stands in `conf/`, the only place of defaults. `fedsim --help` lists the same; a setting is typed "
        "`key=value`, an option of a group `group=option`. Methods have [pages of their own](methods.md).",
        "## A run",
        table(options(CONF / "config.yaml")),
    ]
    for group in sorted(
        f for f in CONF.iterdir() if f.is_dir() and f.name not in ("strategy", "__pycache__")
    ):
        parts.append(f"## {group.name}")
        for file in sorted(group.rglob("*.yaml")):
            name = file.relative_to(group).with_suffix("").as_posix()
            parts += [f"### {group.name}={name}", _cell(described(file))]
            if group.name != "experiment":
                everywhere = "@package _global_" in file.read_text()
                parts.append(table(options(file), "" if everywhere else f"{group.name}."))
    return "\n\n".join(parts) + "\n"


def _parents(file: Path) -> list[Path]:
    names = [
        found["name"] or found["short"] for found in map(PARENT.match, file.read_text().splitlines()) if found
    ]
    return [path for name in names if (path := file.with_name(f"{name}.yaml")).exists()]


def _code(value: str) -> str:
    return f"`` {value} ``" if "`" in value else f"`{value}`"


def _cell(text: str) -> str:
    """Text of a comment inside a table: its bars separate nothing, its angles and stars are no marks; code stays."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([|*])", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    parts[::2] = plain
    return "".join(parts)
