"""The threat model's table of what methods send is what they send, and covers every option of conf/strategy."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sent import BEGIN, END, ROOT, options, row

PAGE = (ROOT / "docs/threat_model.md").read_text()
ROWS = {
    line.split("`")[1]: line
    for line in PAGE.partition(BEGIN)[2].partition(END)[0].splitlines()
    if line.startswith("| `")
}
WORDS = PAGE.partition(END)[2]


def test_every_method_has_a_row_and_every_word_of_the_rows_is_explained() -> None:
    assert list(ROWS) == options(), "print the table: python tests/flower/sent.py"
    named = {name for line in ROWS.values() for name in re.findall(r"`(\w+)`", line.partition("` |")[2])}
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", WORDS, re.MULTILINE))))
    assert named == explained


@pytest.mark.parametrize("option", options())
def test_a_row_is_what_clients_of_the_method_send(option: str) -> None:
    assert ROWS[option] == row(option)
