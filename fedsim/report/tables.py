"""The table of a report as text: for the terminal, Markdown, HTML and as CSV. Its numbers are those of ``frame``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from fedsim.report.runs import short_names, short_value

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from fedsim.report.objective import Objective

_WORDS = {
    "difference": "difference",
    "verdict": "verdict",
    "best_test": "best % (test, optimistic)",
    "rounds_to_target": "rounds to {target}%",
    "megabytes": "MB",
    "seconds": "s",
    "sim_seconds": "sim. s",
    "time_to_target": "sim. s to {target}%",
    "joules": "J",
    "epsilon_spent": "epsilon spent",
    "at_delta": "at delta",
}
_BUDGET = ("epsilon_spent", "at_delta")
_TOTALS = ("megabytes", "seconds", "sim_seconds", "time_to_target", "joules")
_INSIDE = {
    "seeds",
    "low",
    "high",
    "p_holm",
    "needed",
    "reached",
    "resolution",
    "note",
}  # within others, or below
MARKS = {"best": " *", "tie": " °", "grey": ""}  # in plain text


@dataclass(frozen=True)
class Cell:
    """A cell's text, and its mark: ``best``, ``tie`` (one of several equivalent leaders), ``grey`` (not ranked), or
    none."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class TextTable:
    """The table as text: ``rows[i][j]`` stands under ``header[j]``; ``notes[i]`` is empty if all is well."""

    header: Sequence[str]
    numeric: Sequence[bool]  # columns of numbers
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str]
    blocks: Sequence[int] = ()  # of each row
    below: Sequence[str] = ()  # lines under the table

    def remarks(self) -> list[str]:
        """Notes with the row they belong to, then the lines below."""
        noted = [(row[0].text, note) for row, note in zip(self.rows, self.notes, strict=True) if note]
        return [*(f"{name}: {note}" for name, note in noted), *self.below]


def layout(frame: pd.DataFrame) -> TextTable:
    """What :func:`fedsim.report.compare` returned as text, shares in percent."""
    objective: Objective = frame.attrs["objective"]
    shown = [c for c in frame.columns if c not in _INSIDE and not c.endswith("_std")]
    empty = [c for c in ("difference", "verdict") if c in shown and _blank(frame[c])]
    shown = [c for c in shown if c not in empty]
    values = {objective.column, *frame.attrs["extra"], "best_test"}
    own = {"method", "n", *_WORDS, *values}
    names = short_names(column for column in shown if column not in own)
    target = frame.attrs.get("target")
    said = {
        k: v.format(target="target" if target is None else f"{100 * target:g}") for k, v in _WORDS.items()
    }
    said = {k: v.replace("target%", "target") for k, v in said.items()}
    said |= {c: f"{c} %" if _share(c, objective) else c for c in values if c != "best_test"}
    records = frame.to_dict("records")
    digits = {c: _digits(frame[c]) for c in (*_TOTALS, *values) if c in frame}
    stars = frame.attrs["stars"]
    rows = [
        [
            Cell(_text(row, c, objective, values, digits.get(c, 0)), stars.get(c, {}).get(at, ""))
            for c in shown
        ]
        for at, row in enumerate(records)
    ]
    header = [said.get(c, names.get(c, c)) for c in shown]
    numeric = [c in {"n", "difference", "rounds_to_target", *_TOTALS, *_BUDGET, *values} for c in shown]
    notes = [str(row.get("note") or "") for row in records]
    return TextTable(header, numeric, rows, notes, frame.attrs["blocks"], frame.attrs["below"])


def print_table(frame: pd.DataFrame, console: Console | None = None) -> None:
    """Print the table: the best is bold and starred, equivalent leaders have a ring; notes follow.

    A table wider than the terminal keeps its digits and runs over the edge.
    """
    show_text(layout(frame), console)


def show_text(content: TextTable, console: Console | None = None) -> None:
    """Print a table that is laid out already."""
    from rich import box
    from rich.console import Console as RichConsole
    from rich.markup import escape as plain
    from rich.table import Table as RichTable

    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, numeric in zip(content.header, content.numeric, strict=True):
        justify: Literal["right", "left"] = "right" if numeric else "left"
        table.add_column(plain(name), justify=justify, no_wrap=True)
    looks = {"best": "bold green", "tie": "green", "grey": "bright_black"}
    for at, row in enumerate(content.rows):
        ends = at + 1 < len(content.rows) and len(set(content.blocks[at : at + 2])) > 1
        cells = (
            f"[{looks[c.mark]}]{plain(c.text)}{MARKS[c.mark]}[/]" if c.mark else plain(c.text) for c in row
        )
        table.add_row(*cells, end_section=ends)
    console = console or RichConsole()
    needed = table.__rich_measure__(console, console.options.update(max_width=1000)).maximum
    table.width = needed if needed > console.width else None
    console.print(table, crop=False)
    for line in content.remarks():
        console.print(plain(line), style="yellow", soft_wrap=True)


def to_csv(frame: pd.DataFrame) -> str:
    """All numbers in full precision, one line a (setting, method); the ``target`` has a column of its own."""
    frame = frame.copy()
    if "rounds_to_target" in frame:
        frame.insert(list(frame.columns).index("rounds_to_target"), "target", frame.attrs.get("target"))
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_markdown(content: TextTable) -> str:
    """A pipe table; the best in bold, equivalent leaders in italics, notes as a list."""
    around = {"best": "**", "tie": "*", "grey": "", "": ""}

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = line("---:" if numeric else "---" for numeric in content.numeric)
    rows = [line(f"{around[c.mark]}{c.text}{around[c.mark]}" for c in row) for row in content.rows]
    notes = [f"- {remark}" for remark in content.remarks()]
    return "\n".join([line(content.header), rule, *rows, *([""] if notes else []), *notes, ""])


def to_html(frame: pd.DataFrame) -> str:
    """The table in HTML, best in bold, and the notes as a list."""
    return html_of(layout(frame))


def html_of(content: TextTable) -> str:
    """A table that is laid out already, in HTML."""
    rows = [[(cell.text, cell.mark) for cell in row] for row in content.rows]
    notes = "".join(f"<li>{escape(line)}</li>" for line in content.remarks())
    return html_table(content.header, rows, content.numeric) + (
        f'<ul class="notes">{notes}</ul>' if notes else ""
    )


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]], numeric: Sequence[bool], name: str = ""
) -> str:
    """An HTML table from plain text; a cell is ``(text, CSS class)``, the first of a row is its heading."""

    def cell(tag: str, text: str, at: int, name: str = "", scope: str = "") -> str:
        classes = " ".join(filter(None, ("number" if numeric[at] else "", name)))
        kind = f' class="{classes}"' if classes else ""
        role = f' scope="{scope}"' if scope else ""
        return f"<{tag}{role}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, at, scope="col") for at, text in enumerate(header))
    body = []
    for first, *others in rows:
        cells = "".join(cell("td", text, at, name) for at, (text, name) in enumerate(others, 1))
        body.append(f"<tr>{cell('th', first[0], 0, first[1], 'row')}{cells}</tr>")
    content = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"
    return f'<div class="{f"scroll {name}".strip()}" tabindex="0"><table>\n{content}\n</table></div>\n'


def value_text(mean: float, std: float, share: bool, digits: int = 2) -> str:
    """``90.12 ± 0.34``, shares in percent; of one seed without the deviation."""
    if math.isnan(mean):
        return "-"
    scale, digits = (100, 2) if share else (1, digits)
    spread = "" if math.isnan(std) else f" ± {scale * std:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def _text(row: Mapping[str, Any], c: str, objective: Objective, values: set[str], digits: int) -> str:
    value = row[c]
    if c in values:
        return value_text(value, row[f"{c}_std"], _share(c, objective), digits)
    if c == "difference":
        return _difference(row, objective)
    if c == "verdict":
        from fedsim.report.frame import verdict_words

        return verdict_words(value, row["needed"]) or "-"
    if c == "rounds_to_target":
        return _rounds(row)
    if c in _BUDGET:
        return "-" if math.isnan(value) else f"{value:.3g}"
    if c in _TOTALS:
        return "-" if math.isnan(value) else f"{value:,.{digits}f}"
    return "-" if value is None else short_value(c, value)


def _difference(row: Mapping[str, Any], objective: Objective) -> str:
    scale, digits = (100, 2) if objective.share else (1, 4)
    if math.isnan(row["difference"]):
        return "-"
    mean, low, high = (f"{scale * row[k]:+.{digits}f}" for k in ("difference", "low", "high"))
    return mean if math.isnan(row["low"]) else f"{mean} [{low}, {high}]"


def _rounds(row: Mapping[str, Any]) -> str:
    """First rounds at the target: ``<= 20`` where nobody looked in between, ``12 (2 of 3)`` where not all get there."""
    value, seeds = row["rounds_to_target"], len([s for s in str(row["seeds"]).split(",") if s])
    if math.isnan(value):
        return "-"
    text = f"{'<= ' if row['resolution'] > 1 else ''}{round(value, 1):g}"
    return f"{text} ({row['reached']} of {seeds})" if row["reached"] < seeds else text


def _share(column: str, objective: Objective) -> bool:
    if column in (objective.column, "best_test"):
        return objective.share
    from fedsim.report.objective import Objective

    return Objective.parse(column.removesuffix("_std")).share


def _blank(values: Iterable[Any]) -> bool:
    return all(value == "" or value != value for value in values)


def _digits(values: Iterable[float]) -> int:
    """Decimals that give the smallest of a column two digits or more."""
    least = min((value for value in values if value > 0), default=1.0)
    return 0 if least >= 100 else 1 if least >= 1 else min(1 - math.floor(math.log10(least)), 4)
