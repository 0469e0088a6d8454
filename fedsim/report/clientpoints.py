"""Single clients of several runs: what was measured on each last, and that against its size and its skew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.errors import DataError
from fedsim.report.runs import Group, Run
from fedsim.tracking.rows import from_json, tidy

if TYPE_CHECKING:
    from fedsim.report.curves import Curves

OWN = "evaluate/accuracy"  # on a client's own test samples
ALT = (
    "Two scatter plots, a dot a client: accuracy on its own test samples against its number of training samples, "
    "and against the Jensen-Shannon divergence of its labels from those of all"
)
WORDS = (
    "A dot is a client, its values averaged over the seeds in which it has the same partition, on its own test samples "
    "in the last round in which that was measured. Left: its training samples. Right: its label skew, the "
    "Jensen-Shannon divergence (base 2, 0 to 1) of its labels from those of all clients together."
)
MISSING = (
    "Sizes and skew of clients were not recorded (labels that are no classes, or runs of an earlier version): "
    "the same command with resume=never records them."
)
NOT_MEASURED = (
    "Not measured on the clients' own samples: evaluation.holdout=0.2 evaluation.clients_every=10 does."
)
MAX_POINTS = 2000  # of a method; of more, every so many in order of client


Measured = Mapping[
    Path, Mapping[str, Mapping[int, float]]
]  # of each run's folder: values by metric and client


class Point(NamedTuple):
    """A client: training samples, Jensen-Shannon divergence in 0..1, accuracy in 0..1."""

    samples: int
    js: float
    accuracy: float


def last(run: Run, ending: str) -> dict[str, dict[int, float]]:
    """Values by client, of the last round that has any, of each metric in ``clients.jsonl`` whose name ends so.

    Lines of earlier rounds are passed over unread: such files have a line per client and round. Those after
    ``run.until`` do not count. Up to version 0.1.0 there was a line for each metric.
    """
    path = run.dir / "clients.jsonl"
    if not path.exists() or not path.stat().st_size:
        return {}
    named = re.compile(rb'"((?:[^"\\]|\\.)*%s)"(?:: |, "value")' % re.escape(ending.encode()))
    kept: dict[bytes, tuple[bytes, list[bytes]]] = {}
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
        for line in _from_the_end(text, f'{ending}"'.encode()):
            at = line.partition(b",")[0]  # {"round": 12
            for name in named.findall(line):
                if name in kept:
                    if kept[name][0] == at:
                        kept[name][1].append(line)
                elif run.until is None or _early(at, run.until):
                    kept[name] = at, [line]
    values: dict[str, dict[int, float]] = {}
    for name, (_, found) in kept.items():
        for row in chain.from_iterable(map(tidy, _rows(found[::-1]))):
            with suppress(ValueError, KeyError, TypeError):  # a line of another form
                if row["metric"] == json.loads(b'"%s"' % name):
                    values.setdefault(row["metric"], {})[int(row["client"])] = float(row["value"])
    return dict(sorted(values.items()))


def _from_the_end(text: mmap, needle: bytes) -> Iterator[bytes]:
    """The whole lines that hold ``needle``, the last one first."""
    end = len(text)
    while (at := text.rfind(needle, 0, end)) >= 0:
        start, stop = text.rfind(b"\n", 0, at) + 1, text.find(b"\n", at)
        if stop >= 0:  # else half-written
            yield text[start:stop]
        end = start


def _rows(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Lines of JSON parsed all at once; one by one, without those that are none, if there are such."""
    with suppress(ValueError):
        return list(json.loads(b"[" + b",".join(lines) + b"]"))
    found = []
    for line in lines:
        with suppress(ValueError):  # half-written
            found.append(from_json(line))
    return found


def _early(start: bytes, until: int) -> bool:
    """Whether a line that begins with ``{"round": 12`` is of a round up to ``until``."""
    number = start.rpartition(b":")[2].strip()
    return number.isdigit() and int(number) <= until


def points(groups: Sequence[Group], found: Measured) -> tuple[dict[str, list[Point]], str]:
    """The clients of each group (none where nothing is known), and what to say of those that are not there.

    The same client of the same partition is one point, the mean over the runs, of which ``found`` is what :func:`last`
    says, by folder.
    """
    from fedsim.data.skew import FILE, LabelSkew

    out: dict[str, list[Point]] = {}
    remarks: list[str] = []
    for group in groups:
        together: dict[tuple[bytes, int], list[Point]] = {}
        for run in group.runs:
            measured = found[run.dir].get(OWN)
            if not measured:
                remarks.append(NOT_MEASURED)
                continue
            try:
                skew = LabelSkew.load(run.dir / FILE) if (run.dir / FILE).is_file() else None
            except DataError as error:
                remarks.append(f"Left out: {error}.")
                continue
            if skew is None:
                remarks.append(MISSING)
                continue
            same = skew.sizes.tobytes() + skew.js.tobytes()
            for client, accuracy in measured.items():
                if client < len(skew.sizes) and skew.sizes[client]:
                    point = Point(int(skew.sizes[client]), float(skew.js[client]), accuracy)
                    together.setdefault((same, client), []).append(point)
        out[group.label] = [
            Point(some[0].samples, some[0].js, sum(p.accuracy for p in some) / len(some))
            for some in together.values()
        ]
    return out, " ".join(dict.fromkeys(remarks))


def draw(found: Mapping[str, Sequence[Point]]) -> Curves:
    """One panel against samples, one against skew; a method has the colour of its curves."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    from fedsim.report.curves import STYLE, Curves, looks
    from fedsim.report.placing import placed

    with mpl.rc_context(STYLE):
        figure = Curves(figsize=(9.5, 3.8), dpi=110)
        left, right = figure.subplots(1, 2, sharey=True)
        most = max((p.samples for some in found.values() for p in some), default=0)
        least = min((p.samples for some in found.values() for p in some), default=0)
        for (label, some), (colour, _) in zip(found.items(), looks(), strict=False):
            shown = np.array(some[:: max(1, -(-len(some) // MAX_POINTS))], dtype=float).reshape(-1, 3)
            for axes, column in ((left, 0), (right, 1)):
                look: dict[str, Any] = {"markersize": 4, "alpha": 0.6, "markeredgewidth": 0, "color": colour}
                look["label"] = label
                axes.plot(shown[:, column], shown[:, 2], "o", **look)
        left.set(xlabel="training samples of a client", ylabel="accuracy on its own test samples")
        right.set(xlabel="Jensen-Shannon divergence of its labels, bits")
        if most > 20 * max(least, 1):
            left.set_xscale("log")
        else:
            left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        placed(figure)
    return figure
