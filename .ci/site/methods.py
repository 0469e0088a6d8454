"""A page per method: from its YAML, its row in docs/fidelity.md, the tables of docs/results and its docstrings."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from links import ROOT, moved
from mkdocs.exceptions import PluginError
from options import described, options, table, target

FOLDER = ROOT / "conf/strategy"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
SAME = ("below", "see below")  # where the table of docs/fidelity.md sends its reader to a section
WITHOUT = "No page of results names it; its tests hold it."
TABLES = (
    "fidelity.md",
    "methods.md",
    "privacy.md",
    "threat_model.md",
    "refused.md",
)  # pages that name every method


class Row(NamedTuple):
    """A row of the table in docs/fidelity.md: the method as papers call it, and what is said of it."""

    method: str
    equation: str
    code: str
    test: str
    deviations: str


def cells(line: str) -> list[str]:
    """The cells of a table's line; a bar in code is none of its borders."""
    parts = re.split(r"(`[^`]*`)", line.strip().strip("|"))
    joined = "".join(part if part.startswith("`") else part.replace("|", "\0") for part in parts)
    return [cell.strip() for cell in joined.split("\0")]


@cache
def rows() -> dict[str, Row]:
    """By strategy, what docs/fidelity.md says."""
    found = {}
    for line in (ROOT / "docs/fidelity.md").read_text().splitlines():
        if line.startswith("| ") and (names := re.match(r"\| (.*?) \((`\w+`(?:, `\w+`)*)\) \|", line)):
            for name in re.findall(r"`(\w+)`", names[2]):
                found[name] = Row(names[1], *cells(line)[1:])
    return found


@cache
def sections() -> dict[str, str]:
    """By heading, the sections of docs/fidelity.md."""
    _, *parts = re.split(r"^## ", (ROOT / "docs/fidelity.md").read_text(), flags=re.MULTILINE)
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}


def families() -> dict[str, list[str]]:
    """The sections of docs/methods.md, with the strategies of each."""
    _, *parts = re.split(r"^## ", (ROOT / "docs/methods.md").read_text(), flags=re.MULTILINE)
    lines = {part.partition("\n")[0]: part.splitlines() for part in parts}
    return {
        family: [n for line in text if line.startswith("| `") for n in re.findall(r"`(\w+)`", cells(line)[0])]
        for family, text in lines.items()
    }


def linked(text: str) -> str:
    """``text`` of docs/ with names of strategies in tables leading to their pages."""
    names = re.compile(rf"(?<!\[)`({'|'.join(NAMES)})`")
    lines = [
        names.sub(r"[`\1`](methods/\1.md)", line) if line.startswith("|") else line
        for line in text.split("\n")
    ]
    return "\n".join(lines)


def page(name: str) -> str:
    """The page of ``strategy=name``, with links as in docs/."""
    if name not in rows():
        raise PluginError(
            f"docs/fidelity.md has no row with (`{name}`) behind the method's name: CONTRIBUTING.md"
        )
    row, file = rows()[name], FOLDER / f"{name}.yaml"
    details = {title: text for title, text in sections().items() if _is_of(title, row.method)}
    equation = "" if row.equation in SAME else row.equation
    parts = [f"# `{name}`: {row.method}", described(file), "## Equation", equation]
    parts += [f"### {title}\n\n{text}" for title, text in details.items()]
    if row.deviations not in SAME:
        parts.append(f"**Known deviations from the paper**: {row.deviations}.")
    if row.test not in SAME:
        parts.append(f"**Held by tests**: {row.test}.")
    parts.append("[What holds for several methods](fidelity.md#what-holds-for-several-methods)")
    parts += [
        "## Options",
        f"`strategy={name}`, and to change one `strategy.OPTION=VALUE`:",
        table(options(file)),
    ]
    parts += [
        "## Results",
        _results(name, row.method),
        "## Code",
        _code(target(file), row.code + "".join(details.values())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_of(title: str, method: str) -> bool:
    """Whether a section is about the method: `FedSpeed, line by line`."""
    return title.split(",")[0] in re.split(r", ", method) and "," in title


def _results(name: str, method: str) -> str:
    """Rows of tables in docs/results that begin with the method's name, and the pages that name it."""
    names = [name, *re.split(r", | \+ ", method)]
    first = re.compile(rf"[`*]*({'|'.join(map(re.escape, names))})[`*]*(?![\w-])")
    said = re.compile(
        rf"`(?:strategy=)?{name}`|strategy=(?:\w+,)*{name}\b|\b({'|'.join(map(re.escape, names[1:]))})\b"
    )
    parts, others = [], []
    for file in sorted((ROOT / "docs/results").glob("*.md")):
        text = file.read_text()
        link = f"[{_title(file)}](results/{file.name})"
        if file.name == "README.md":
            continue
        if tables := _tables(text, first):
            here = [moved(rows, f"docs/results/{file.name}", "docs/methods.md") for rows in tables]
            parts += [f"From {link}, where its setting stands:", *here]
        elif said.search(text):
            others.append(link)
    if others:
        parts.append(f"Named in {', '.join(others)}.")
    guides = [file for file in sorted((ROOT / "docs").glob("*.md")) if file.name not in TABLES]
    quoted = re.compile(rf"`(?:strategy=)?{name}`")
    found = [f"[{_title(file)}]({file.name})" for file in guides if quoted.search(file.read_text())]
    seen = f"In the guides: {', '.join(found)}." if found else ""
    return "\n\n".join([*(parts or [WITHOUT]), seen])


def _title(page: Path) -> str:
    return page.read_text().partition("\n")[0].removeprefix("# ")


def _tables(text: str, first: re.Pattern[str]) -> list[str]:
    """Tables of ``text`` cut down to the rows whose first cell the pattern matches."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, line, *body = block.splitlines()
        if kept := [row for row in body if first.match(cells(row)[0])]:
            found.append("\n".join([head, line, *kept]))
    return found


def _code(strategy: str, said: str) -> str:
    """The class of the strategy and the modules that the row names, by docstrings, with their source."""
    shown = [strategy]
    for room, module in re.findall(r"`(clients|strategies)/(\w+)\.py", said):
        name = f"{room}.{module}"
        if (
            name not in shown
            and name != strategy.rpartition(".")[0]
            and Path(ROOT, room, f"{module}.py").exists()
        ):
            shown.append(name)
    lines = (
        "    options:\n      show_source: true\n      skip_local_inventory: true\n      heading_level: 3\n"
    )
    return "\n\n".join(f"::: {name}\n{lines}" for name in shown)
