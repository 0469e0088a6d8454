"""The table of a report in LaTeX: rules of booktabs, numbers aligned by siunitx, notes by threeparttable."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsim.report.tables import Cell, TextTable

HEAD = """\
% To see it alone, save this as show.tex beside it:
%   \\documentclass[varwidth=\\maxdimen]{standalone}
%   \\usepackage{booktabs,siunitx,threeparttable}
%   \\sisetup{separate-uncertainty, detect-weight}
%   \\begin{document}\\input{table.tex}\\end{document}"""
_NUMBER = re.compile(r"(\d+)(?:\.(\d+))?(?: ± (\d+)(?:\.(\d+))?)?")
_SPECIAL = {
    **{ord(character): f"\\{character}" for character in "&%$#_{}"},
    ord("\\"): "\\textbackslash{}",
    ord("~"): "\\textasciitilde{}",
    ord("^"): "\\textasciicircum{}",
    ord("<"): "\\textless{}",
    ord(">"): "\\textgreater{}",
    ord("|"): "\\textbar{}",
    ord("±"): "$\\pm$",
    **{ord(sign): f"$^{{{digit}}}$" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}


def to_latex(content: TextTable) -> str:
    """A ``threeparttable``: the best bold (several, if they are equivalent), notes with numbers, blocks by a rule."""
    columns = list(zip(*content.rows, strict=True)) if content.rows else [()] * len(content.header)
    formats = [
        _format(cells) if numeric else "" for cells, numeric in zip(columns, content.numeric, strict=True)
    ]
    spec = [
        f"S[table-format={f}]" if f else "r" if n else "l"
        for f, n in zip(formats, content.numeric, strict=True)
    ]
    header = [f"{{{tex(name)}}}" if f else tex(name) for name, f in zip(content.header, formats, strict=True)]
    lines = [HEAD, "\\begin{threeparttable}", "\\begin{tabular}{" + " ".join(spec) + "}", "\\toprule"]
    lines += [" & ".join(header) + " \\\\", "\\midrule"]
    noted = [at for at, note in enumerate(content.notes) if note]
    for at, row in enumerate(content.rows):
        if at and content.blocks and content.blocks[at] != content.blocks[at - 1]:
            lines.append("\\midrule")
        cells = [_cell(cell, aligned) for cell, aligned in zip(row, formats, strict=True)]
        cells[0] += f"\\tnote{{{noted.index(at) + 1}}}" if at in noted else ""
        lines.append(" & ".join(cells) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    notes = [f"\\item[{number}] {tex(content.notes[at])}" for number, at in enumerate(noted, 1)]
    notes += [f"\\item {tex(line)}" for line in content.below]
    if any(cell.mark == "tie" for row in content.rows for cell in row):
        notes.append("\\item Several in bold are equivalent.")
    if notes:
        lines += ["\\begin{tablenotes}\\footnotesize", *notes, "\\end{tablenotes}"]
    return "\n".join([*lines, "\\end{threeparttable}", ""])


def tex(text: str) -> str:
    """Plain text for LaTeX, where a bracket or a star after the end of a row or an ``\\item`` would belong to that."""
    found = " ".join(text.translate(_SPECIAL).split())
    return f"{{}}{found}" if found.startswith(("[", "*")) else found


def _cell(cell: Cell, aligned: str) -> str:
    leads = cell.mark in ("best", "tie")
    bold = "\\bfseries " if leads else ""
    if aligned and _NUMBER.fullmatch(cell.text):
        return bold + cell.text.replace("±", "\\pm")
    text = f"\\textbf{{{tex(cell.text)}}}" if leads else tex(cell.text)
    return f"{{{text}}}" if aligned else text


def _format(cells: Sequence[Cell]) -> str:
    """``2.2(2)``: digits before and after the point, and of the deviation; empty where nothing is a plain number."""
    found = [match for cell in cells if (match := _NUMBER.fullmatch(cell.text))]
    if not found:
        return ""
    before, after = (max(len(match[part] or "") for match in found) for part in (1, 2))
    spread = max((len((m[3] + (m[4] or "")).lstrip("0")) or 1 for m in found if m[3]), default=0)
    return f"{before}.{after}" + (f"({spread})" if spread else "") if after else f"{before}"
