"""Numbers for an operator's dashboards, as a text file in Prometheus' exposition format.

``node_exporter --collector.textfile.directory=DIR`` and most agents read such files: no port is opened, nothing is
installed. The file is replaced as a whole, so that a reader never sees half of it.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedsim.tracking.base import Row, RunInfo, Tracker

Labels = tuple[tuple[str, str], ...]
Samples = dict[tuple[str, Labels], float]  # by name and labels

HELP: Mapping[str, str] = {
    "fedsim_running": "1 while the run is under way",
    "fedsim_failed": "1 if the run ended without being done or interrupted",
    "fedsim_rounds_total": "finished rounds, those before a resume included",
    "fedsim_rounds_wanted": "rounds that the run is to have",
    "fedsim_bytes_total": "payload since the start of this process, seen from the clients",
    "fedsim_client_failures_total": "clients that failed, dropped out or sent no numbers, since the start",
    "fedsim_round_seconds": "of the last round",
    "fedsim_last_round_timestamp_seconds": "when the last round ended",
    "fedsim_accuracy": "on the common test set, where measured last",
    "fedsim_loss": "on the common test set, where measured last",
    "fedsim_node_messages_total": "messages that this node answered, by what became of them",
    "fedsim_node_bytes_total": "payload of those messages, seen from the client",
    "fedsim_node_last_message_timestamp_seconds": "when the last one was answered",
}
_LINE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\})? ([-+]?(?:[0-9.]+(?:e[-+]?\d+)?|inf|nan))')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {"\\": "\\\\", "\n": "\\n", '"': '\\"'}


class PrometheusTracker(Tracker):
    """Keeps the file at ``path`` up to date, round by round."""

    def __init__(self, path: Path) -> None:
        self._path, self._samples = path, Samples()
        self._run: Labels = ()

    def start(self, run: RunInfo) -> None:
        """The run is under way."""
        self._run = (("run", run.name), ("method", run.method))
        self._set("fedsim_running", 1)
        self._set("fedsim_failed", 0)
        self._set("fedsim_rounds_total", run.start_round)
        self._set("fedsim_rounds_wanted", run.rounds)
        for way in ("up", "down"):
            self._add("fedsim_bytes_total", 0, direction=way)
        write(self._path, self._samples)

    def round(self, row: Row, clients: Sequence[Row]) -> None:
        """Numbers of a round."""
        self._set("fedsim_rounds_total", row["round"])
        self._set("fedsim_last_round_timestamp_seconds", time.time())
        for name, key in (("round_seconds", "seconds"), ("accuracy", "accuracy"), ("loss", "loss")):
            if isinstance(row.get(key), int | float):
                self._set(f"fedsim_{name}", row[key])
        for way in ("up", "down"):
            self._add("fedsim_bytes_total", row.get(f"bytes_{way}") or 0, direction=way)
        for failure in row.get("failures") or ():
            self._add("fedsim_client_failures_total", 1, kind=str(failure["kind"]))
        write(self._path, self._samples)

    def end(self, summary: Row) -> None:
        """The run is over."""
        self._set("fedsim_running", 0)
        self._set("fedsim_failed", float(summary.get("status") not in ("done", "interrupted")))
        write(self._path, self._samples)

    def _set(self, name: str, value: float) -> None:
        self._samples[name, self._run] = value

    def _add(self, name: str, value: float, **labels: str) -> None:
        key = name, (*self._run, *labels.items())
        self._samples[key] = self._samples.get(key, 0) + value


def exposition(samples: Samples) -> str:
    """The text: help, type and samples of each name, names in order."""
    lines = list[str]()
    for name in sorted({name for name, _ in samples}):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} {kind}"]
        lines += [
            f"{name}{_braced(labels)} {value:.17g}" for (n, labels), value in samples.items() if n == name
        ]
    return "\n".join([*lines, ""])


def parsed(text: str) -> Samples:
    """The inverse of :func:`exposition`; lines that are none are left out."""
    found = Samples()
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            labels = tuple((k, _plain(v)) for k, v in _LABEL.findall(match[2] or ""))
            found[match[1], labels] = float(match[3])
    return found


def write(path: Path, samples: Samples) -> None:
    """Put the text in place of what the file held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(exposition(samples))
    scratch.replace(path)


def add(path: Path, counts: Iterable[tuple[str, Labels, float]], times: Iterable[tuple[str, Labels]]) -> None:
    """Add to counters that the file holds, and set ``times`` to now: for processes that live for one message each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        samples = parsed(path.read_text()) if path.exists() else Samples()
        samples = {key: value for key, value in samples.items() if key[0] in HELP}
        for name, labels, more in counts:
            samples[name, labels] = samples.get((name, labels), 0) + more
        for name, labels in times:
            samples[name, labels] = time.time()
        write(path, samples)


def _braced(labels: Labels) -> str:
    inner = ",".join(f'{k}="{"".join(_ESCAPES.get(c, c) for c in v)}"' for k, v in labels)
    return f"{{{inner}}}" if inner else ""


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text)
