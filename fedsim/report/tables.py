"""The comparison as text: for the terminal, LaTeX, HTML and as CSV. Its numbers come from ``fedsim.report``."""

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

# Which end of a column leads.
BEST: dict[str, Any] = {
    "accuracy": max,
    "best": max,
    "rounds_to_target": min,
    "megabytes": min,
    "seconds": min,
    "sim_seconds": min,
    "time_to_target": min,
    "joules": min,
}
_TERMINAL = {
    "accuracy": "final %",
    "best": "best %",
    "rounds_to_target": "to {target}%",
    "megabytes": "MB",
    "seconds": "s",
    "sim_seconds": "sim. s",
    "time_to_target": "sim. s to {target}%",
    "joules": "J",
}
_PAPER = {
    "accuracy": "final accuracy, %",
    "best": "best accuracy, %",
    "rounds_to_target": "rounds to {target} %",
    "megabytes": "traffic, MB",
    "seconds": "time, s",
    "sim_seconds": "simulated time, s",
    "time_to_target": "simulated time to {target} %, s",
    "joules": "energy, J",
}
_TO_TARGET = ("rounds_to_target", "time_to_target")
_OWN = {"method", "seeds", *BEST}  # columns that are no settings
_INSIDE = {"accuracy_std", "best_std", "reached", "note"}  # shown within other columns, or below the table


@dataclass(frozen=True)
class Cell:
    """A cell's text, and whether it leads its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class TextTable:
    """The comparison as text: ``rows[i][j]`` stands under ``header[j]``; ``notes[i]`` is empty if all is well."""

    header: Sequence[str]
    numeric: Sequence[bool]  # columns of numbers
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str]


def layout(frame: pd.DataFrame, headers: Mapping[str, str] = _PAPER) -> TextTable:
    """What :func:`fedsim.report.compare` returned as text, accuracies in percent.

    The best value of a column leads, and so does one that looks the same; nobody leads where all are equal.
    Groups with a note are no candidates, nor are for the rounds to the target those of which a seed never got there.
    """
    shown = [column for column in frame.columns if column not in _INSIDE]
    records = frame.to_dict("records")
    target = frame.attrs.get("target")
    names = short_names(column for column in shown if column not in _OWN)
    words = {
        key: text.format(target="target" if target is None else f"{100 * target:g}")
        for key, text in headers.items()
    }
    if target is None:
        words |= {k: words[k].replace("target %", "target").replace("target%", "target") for k in _TO_TARGET}
    digits = {column: _digits(frame[column]) for column in BEST if column in shown}
    leaders = {column: _leaders(records, column, digits[column]) for column in digits}
    rows = [
        [Cell(_text(row, column, digits.get(column, 0)), at in leaders.get(column, ())) for column in shown]
        for at, row in enumerate(records)
    ]
    header = [words.get(column, names.get(column, column)) for column in shown]
    return TextTable(
        header, [c in BEST for c in shown], rows, [str(row.get("note") or "") for row in records]
    )


def print_table(frame: pd.DataFrame, console: Console | None = None) -> None:
    """Print the comparison: the best of a column is bold and starred, the notes follow the table.

    A table wider than the terminal keeps its digits and runs over the edge.
    """
    from rich import box
    from rich.console import Console as RichConsole
    from rich.markup import escape as plain
    from rich.table import Table as RichTable

    content = layout(frame, _TERMINAL)
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, numeric in zip(content.header, content.numeric, strict=True):
        justify: Literal["right", "left"] = "right" if numeric else "left"
        table.add_column(plain(name), justify=justify, no_wrap=True)
    for row in content.rows:
        table.add_row(*(f"[bold green]{plain(c.text)} *[/]" if c.best else plain(c.text) for c in row))
    console = console or RichConsole()
    needed = table.__rich_measure__(console, console.options.update(max_width=1000)).maximum
    table.width = needed if needed > console.width else None
    console.print(table, crop=False)
    for line in _remarks(frame, content):
        console.print(plain(line), style="yellow")


def to_csv(frame: pd.DataFrame) -> str:
    """All numbers of the comparison in full precision, one line a group; the ``target`` has a column of its own."""
    frame = frame.copy()
    frame.insert(list(frame.columns).index("rounds_to_target"), "target", frame.attrs.get("target"))
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_latex(frame: pd.DataFrame) -> str:
    """The comparison as a LaTeX ``tabular`` with booktabs' rules: best in bold, notes as footnotes."""
    content = layout(frame)
    marks = [f"$^{{{number}}}$" for number in range(1, len(content.notes) + 1)]
    lines = ["% needs \\usepackage{booktabs}"]
    lines.append("\\begin{tabular}{" + "".join("r" if numeric else "l" for numeric in content.numeric) + "}")
    lines += ["\\toprule", " & ".join(map(_tex, content.header)) + " \\\\", "\\midrule"]
    noted = [index for index, note in enumerate(content.notes) if note]
    for index, row in enumerate(content.rows):
        cells = [f"\\textbf{{{_tex(c.text)}}}" if c.best else _tex(c.text) for c in row]
        cells[0] += marks[noted.index(index)] if index in noted else ""
        lines.append(" & ".join(cells) + " \\\\")
    lines.append("\\bottomrule")
    for mark, index in zip(marks, noted, strict=False):
        note = f"{mark} {_tex(content.notes[index])}"
        lines.append(f"\\multicolumn{{{len(content.header)}}}{{l}}{{\\footnotesize {note}}} \\\\")
    return "\n".join([*lines, "\\end{tabular}", ""])


def to_html(frame: pd.DataFrame) -> str:
    """The comparison as an HTML table, best in bold, and the notes as a list."""
    content = layout(frame)
    rows = [[(cell.text, "best" if cell.best else "") for cell in row] for row in content.rows]
    notes = "".join(f"<li>{escape(line)}</li>" for line in _remarks(frame, content))
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


def _remarks(frame: pd.DataFrame, content: TextTable) -> list[str]:
    """Notes with the group they belong to."""
    keys = [column for column in frame.columns if column not in _OWN | _INSIDE]
    names = short_names(keys)
    lines = []
    for row, note in zip(frame.to_dict("records"), content.notes, strict=True):
        settings = (f"{names[k]}={short_value(k, row[k])}" for k in keys if row[k] is not None)
        if note:
            lines.append(f"{', '.join([row['method'], *settings])} (seeds {row['seeds']}): {note}")
    return lines


def _leaders(records: Sequence[Mapping[str, Any]], column: str, digits: int) -> set[int]:
    """Rows that show the column's best value, unless all show the same."""
    shown = {index: _mean(row, column, digits) for index, row in enumerate(records)}
    known = {
        index: row[column]
        for index, row in enumerate(records)
        if not row.get("note")
        and math.isfinite(row[column])
        and (column not in _TO_TARGET or row["reached"] == _seeds(row))
    }
    candidates = {text for index, text in shown.items() if not records[index].get("note")}
    if not known or len(candidates) < 2:
        return set()
    best = shown[BEST[column](known, key=known.__getitem__)]
    return {index for index in known if shown[index] == best}


def _text(row: Mapping[str, Any], column: str, digits: int) -> str:
    if column not in BEST:
        value = row[column]
        return "-" if value is None else short_value(column, value)
    mean = _mean(row, column, digits)
    if column in ("accuracy", "best") and not math.isnan(row[f"{column}_std"]):
        return f"{mean} ± {100 * row[f'{column}_std']:.2f}"
    if column in _TO_TARGET and mean != "-" and row["reached"] < _seeds(row):
        return f"{mean} ({row['reached']} of {_seeds(row)} seeds)"
    return mean


def _mean(row: Mapping[str, Any], column: str, digits: int = 1) -> str:
    """The mean of a numeric column as it is shown."""
    value = row[column]
    if math.isnan(value):
        return "-"
    if column in ("accuracy", "best"):
        return f"{100 * value:.2f}"
    if column == "rounds_to_target":
        return f"{round(value, 1):g}"
    return f"{value:,.{digits}f}"


def _digits(values: Iterable[float]) -> int:
    """Decimals that give the smallest of a column two digits or more."""
    least = min((value for value in values if value > 0), default=1.0)
    return 0 if least >= 100 else 1 if least >= 1 else min(1 - math.floor(math.log10(least)), 4)


def _seeds(row: Mapping[str, Any]) -> int:
    return len(str(row["seeds"]).split(","))


_SPECIAL = {
    **{ord(character): f"\\{character}" for character in "&%$#_{}"},
    ord("\\"): "\\textbackslash{}",
    ord("~"): "\\textasciitilde{}",
    ord("^"): "\\textasciicircum{}",
    ord("<"): "\\textless{}",
    ord(">"): "\\textgreater{}",
    ord("±"): "$\\pm$",
}


def _tex(text: str) -> str:
    return " ".join(text.translate(_SPECIAL).split())
