"""How far the partitions of the runs at hand are from identical clients, from what ``summary.json`` says of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fedsim.report import prose
from fedsim.report.runs import Group
from fedsim.report.tables import html_table

MEASURES = {"js": "JS", "emd": "EMD", "hellinger": "Hellinger", "size_cv": "size variation"}
WORDS = (
    "Label skew is a mean over clients of a distance between a client's label distribution p and that of all training "
    "samples together, q. JS: Jensen-Shannon divergence to base 2, 0 to 1. EMD: earth mover's distance as the field "
    "takes it, the sum over classes of |p - q|, 0 to 2. Hellinger: 0 to 1. Size variation: standard deviation of the "
    "clients' sizes over their mean."
)


def measured(groups: Sequence[Group]) -> dict[str, list[Mapping[str, Any]]]:
    """Measures of each distinct partition, under the words of its configuration (seeds apart)."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for group in groups:
        for run in group.runs:
            if isinstance(non_iid := run.summary.get("non_iid"), Mapping):
                partition = run.config.get("partition")
                if isinstance(partition, Mapping):
                    partition = {key: value for key, value in partition.items() if key != "seed"}
                name = str(run.summary.get("partition_hash") or json.dumps(non_iid, sort_keys=True))
                words = f"{prose.part_words(partition)}, {prose.count(run.config.get('num_clients', '?'), 'client')}"
                found.setdefault(words, {}).setdefault(name, non_iid)
    return {words: list(one.values()) for words, one in found.items()}


def lines(groups: Sequence[Group]) -> Iterator[str]:
    """A line of plain text per kind of partition."""
    for words, some in measured(groups).items():
        numbers = ", ".join(f"{name} {_mean(some, key)}" for key, name in MEASURES.items())
        yield f"{words}: {prose.count(len(some), 'partition')}, {numbers}, samples {_sizes(some)}"


def table(groups: Sequence[Group]) -> str:
    """The same as an HTML table with its definitions; empty where no run says anything."""
    found = measured(groups)
    rows = [
        [
            (text, "")
            for text in (words, str(len(some)), *(_mean(some, key) for key in MEASURES), _sizes(some))
        ]
        for words, some in found.items()
    ]
    if not rows:
        return ""
    header = ["partition", "drawn", *MEASURES.values(), "samples of a client"]
    table = html_table(header, rows, [False, *[True] * 6], "plain")
    return f'{table}<p class="soft">{escape(WORDS)}</p>\n'


def _mean(some: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [float(one[key]) for one in some if one.get(key) is not None]
    return f"{statistics.fmean(values):.3f}" if values else "-"


def _sizes(some: Sequence[Mapping[str, Any]]) -> str:
    low, high = min(int(one["smallest"]) for one in some), max(int(one["largest"]) for one in some)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
