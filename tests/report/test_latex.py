"""Tables in LaTeX: no TeX is here to compile them, so their structure is taken apart."""

from __future__ import annotations

import re

import pytest
from runfolder import make

from fedsim.report import compare, compared_blocks, default_plan, load_runs
from fedsim.report.latex import tex, to_latex
from fedsim.report.pivot import pivot
from fedsim.report.tables import Cell, TextTable, layout

ODD = r"""a_b&c 50% #1 $x^2~{y}\z <|>"""
KNOWN = {"begin", "end", "toprule", "midrule", "bottomrule", "bfseries", "textbf", "pm", "tnote", "item"}
KNOWN |= {
    "footnotesize",
    *(f"text{name}" for name in ("backslash", "asciitilde", "asciicircum", "less", "greater", "bar")),
}


def cells_of(row: str) -> list[str]:
    """The cells of a row that ends with ``\\\\``, split where TeX splits it."""
    assert row.endswith(" \\\\"), row
    out, depth, at, text = [""], 0, 0, row[:-3]
    while at < len(text):
        piece = text[at : at + 2] if text[at] == "\\" else text[at]
        depth += {"{": 1, "}": -1}.get(piece, 0)
        assert depth >= 0, row
        if piece == "&" and depth == 0:
            out.append("")
        else:
            out[-1] += piece
        at += len(piece)
    assert depth == 0, row
    return [cell.strip() for cell in out]


def fits(number: str, form: str) -> bool:
    """Whether a number has no more digits than its column's ``table-format`` has places for."""
    before, after, spread = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:\((\d+)\))?", form).groups(default="0")
    whole, _, error = number.partition(" \\pm ")
    digits = whole.partition(".")[::2]
    own = error.replace(".", "").lstrip("0") or "0" * bool(error)
    return len(digits[0]) <= int(before) and len(digits[1]) <= int(after) and len(own) <= int(spread)


def taken_apart(text: str) -> list[list[str]]:
    """The rows of a table, after everything that can be told without TeX was checked."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    body = "\n".join(lines)
    open_: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        assert kind == "begin" or open_.pop() == name
        open_ += [name] * (kind == "begin")
    assert not open_
    bare = re.sub(r"\\[&%$#_{}\\]", "", body)  # what is escaped, and ends of rows
    assert set(re.findall(r"\\([A-Za-z]+)", bare)) <= KNOWN
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"[%#_~|<>]", bare) and "^" not in re.sub(r"\$\^\{\d\}\$", "", bare)
    assert "$" not in re.sub(r"\$(\^\{\d\}|\\pm)\$", "", bare)
    assert body.isascii()
    (spec,) = re.findall(r"\\begin\{tabular\}\{(.*)\}", body)
    columns = re.findall(r"S\[table-format=([\d.()]+)\]|[lr]", spec)
    inner = body.partition("\\toprule\n")[2].partition("\n\\bottomrule")[0].splitlines()
    rows = [cells_of(line) for line in inner if line != "\\midrule"]
    assert {len(row) for row in rows} == {len(columns)}
    for row in rows[1:]:
        assert not row[0].startswith(("[", "*"))
        for cell, form in zip(row, columns, strict=True):
            number = cell.removeprefix("\\bfseries ")
            assert not form or re.fullmatch(r"\{.*\}", cell) or fits(number, form), (cell, form)
    assert all(re.fullmatch(r"\{.*\}", head) for head, form in zip(rows[0], columns, strict=True) if form)
    told = re.findall(r"\\tnote\{(\d+)\}", body)
    assert told == re.findall(r"\\item\[(\d+)\]", body) == [str(n + 1) for n in range(len(told))]
    return rows


@pytest.fixture
def runs(tmp_path):
    for seed in range(5):
        for method, gain in (("fedavg", 0.0), (ODD, 0.02 + seed / 1e4), ("[x] *", 0.02)):
            values = [0.5] * 3 + [0.8 + seed / 50 + gain]
            status = "failed" if seed == 4 and method == ODD else "done"
            for alpha in (0.1, 10.0):
                folder = f"{len(method)}-{seed}-{alpha}"
                make(tmp_path, method, seed, values, folder=folder, partition={"alpha": alpha}, status=status)
    return load_runs([tmp_path])


def test_a_table_of_odd_names_is_whole(runs):
    frame = compare(runs, columns=["difference", "verdict", "rounds_to_target", "seconds"])
    text = to_latex(layout(frame))
    rows = taken_apart(text)
    assert len(rows) == 7 and text.count("\\midrule") == 2 and "\\item[2]" in text
    assert tex(ODD) in text and "\\bfseries" not in text.partition("\\midrule")[0]
    assert any(row[0] == "{}[x] *" for row in rows)


def test_a_pivot_with_exponents_is_whole(runs):
    plan = default_plan(runs)
    ((_, table),) = pivot(compared_blocks(runs, plan), plan, "method", "alpha")
    assert "$^{4}$" in to_latex(table) and len(taken_apart(to_latex(table))) == 4


def test_marks_and_numbers_of_all_kinds():
    rows = [
        [Cell("a"), Cell("9.5 ± 0.03", "best"), Cell("1,234"), Cell("12", "grey")],
        [Cell("*"), Cell("10.25", "tie"), Cell("-"), Cell("7")],
        [Cell("c"), Cell("-", "tie"), Cell("-3"), Cell("-")],
    ]
    table = TextTable(["m", "x %", "y", "z"], [False, True, True, True], rows, ["", "why", ""], [0, 1, 1])
    text = to_latex(table)
    assert taken_apart(text)[1:] == [
        ["a", "\\bfseries 9.5 \\pm 0.03", "1,234", "12"],
        ["{}*\\tnote{1}", "\\bfseries 10.25", "-", "7"],
        ["c", "{\\textbf{-}}", "-3", "{-}"],
    ]
    assert "S[table-format=2.2(1)] r S[table-format=2]" in text and "Several in bold are equivalent." in text


@pytest.mark.parametrize(
    "broken",
    [
        "\\begin{tabular}{l}\n\\toprule\na & b \\\\\n\\bottomrule\n\\end{tabular}",
        "\\begin{tabular}{l}\n\\toprule\na_b \\\\\n\\bottomrule\n\\end{tabular}",
        "\\begin{tabular}{l}\n\\toprule\n{a \\\\\n\\bottomrule\n\\end{tabular}",
        "\\begin{tabular}{l}\n\\toprule\na \\\\\n\\bottomrule\n\\end{threeparttable}",
    ],
    ids=["columns", "escape", "brace", "environment"],
)
def test_the_check_sees_what_is_broken(broken):
    with pytest.raises(AssertionError):
        taken_apart(broken)
