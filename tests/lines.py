"""Tables of what is typed and the line that comes out: files of pairs, the second line of each indented."""

from __future__ import annotations

from pathlib import Path


def pairs(table: Path) -> list[tuple[str, str]]:
    """``(typed, line)`` of every pair; empty lines and those that begin with ``#`` are passed over."""
    lines = [line for line in table.read_text().splitlines() if line.strip() and not line.startswith("#")]
    typed, said = lines[::2], lines[1::2]
    assert len(typed) == len(said) and all(line.startswith("    ") for line in said), table
    assert not any(line.startswith(" ") for line in typed), table
    return [(one.strip(), other.strip()) for one, other in zip(typed, said, strict=True)]
