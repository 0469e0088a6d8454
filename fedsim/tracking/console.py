"""Progress on the terminal: a live view on a terminal, one line a round elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsim.errors import headline
from fedsim.tracking.base import Row, RunInfo, Tracker
from fedsim.tracking.rows import OPEN_WORLD

FULL_LINES = (
    100  # plain output: up to this many rounds, every one has its line; beyond, about this many lines
)
LONGEST_SILENCE = 30.0  # seconds without a plain line
SHOWN_FAILURES = 5  # a round; more are counted
COLOURS = {"done": "green", "interrupted": "yellow"}


class ConsoleTracker(Tracker):
    """Shows stages, rounds, failures and the outcome.

    ``mode``: ``rich`` (a live view with a bar), ``plain`` (a line a round, about a hundred lines in a long
    run, the first and the last round always), ``quiet`` (failures only), ``auto`` (``rich`` on a terminal,
    else ``plain``). ``shows``: numbers of ``all`` samples, or of ``validation`` samples only.
    """

    def __init__(self, mode: str = "auto", console: Console | None = None, shows: str = "all") -> None:
        self.console = console or Console()
        self.mode = ("rich" if self.console.is_terminal else "plain") if mode == "auto" else mode
        self._places = ("",) if shows == "all" else ("val/", "clients_val/")
        self._run: RunInfo | None = None
        self._phase = ""
        self._row: Row = {}
        self._measured: dict[str, float] = {}  # newest numbers of the model, also between evaluated rounds
        self._bytes = 0.0
        self._seconds: list[float] = []
        self._last_line = 0.0
        self._live: Live | None = None
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self, run: RunInfo) -> None:
        """Name the run and where it writes."""
        self._run = run
        for row in run.history:
            self._count(row)
        if self.mode == "quiet":
            return
        self._open()
        resumed = f", after round {run.start_round}" if run.start_round else ""
        self._print(Text.assemble((run.name, "bold"), f": {run.rounds} rounds{resumed}, in {run.dir}"))

    def phase(self, text: str) -> None:
        """Show a stage; plain output only before the first round, where a wait needs an explanation."""
        self._phase = text
        if self.mode == "plain" and not self._row:
            self._print(Text(f"{text} ..."))
        elif self.mode == "rich":
            self._open()
            self._refresh()

    def round(self, row: Row, clients: Sequence[Row]) -> None:
        """Show the round and name each failed client."""
        self._phase, self._row = "", row
        self._count(row)
        self._seconds = [*self._seconds[-9:], float(row.get("seconds") or 0)]
        for text in _failures(row):
            self._print(text)
        if thin := row.get("thin_round"):
            self._print(Text.assemble(f"round {row['round']}: ", ("too few updates", "yellow"), f": {thin}"))
        if self.mode == "rich":
            self._refresh()
        elif self.mode == "plain" and self._due(int(row["round"])):
            self._last_line = time.monotonic()
            self._print(Text("  ".join(text for text, _ in self._facts())))

    def _count(self, row: Row) -> None:
        """Take the numbers of a round, also of one before this process."""
        shown = [place + name for place in self._places for name in ("accuracy", "loss", *OPEN_WORLD)]
        self._measured |= {key: float(row[key]) for key in shown if row.get(key) is not None}
        self._bytes += float(row.get("bytes_up") or 0) + float(row.get("bytes_down") or 0)

    def _name(self, metric: str) -> str:
        """The column of a metric that is shown; empty if none was measured."""
        return next((p + metric for p in self._places if p + metric in self._measured), "")

    def end(self, summary: Row) -> None:
        """Close the live view and say how the run ended; failed runs are named in every mode."""
        self._close()
        status = str(summary.get("status", "done"))
        if self._run is None or (self.mode == "quiet" and status == "done"):
            return
        parts = [f"round {self._at()}/{self._run.rounds}"]
        if name := self._name("accuracy"):
            parts.append(f"{name} {_percent(self._measured[name])}")
        if (spent := summary.get("privacy")) and spent["epsilon"] is not None:
            parts.append(f"epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} ({spent['relation']})")
        if reason := summary.get("error") or summary.get("reason") or summary.get("stopped"):
            parts.append(headline(str(reason)))
        colour = COLOURS.get(status, "red")
        self._print(Text.assemble((self._run.name, "bold"), " ", (status, colour), ": " + ", ".join(parts)))

    def _due(self, at: int) -> bool:
        assert self._run is not None
        first, last = self._run.start_round + 1, self._run.rounds
        every = max(1, math.ceil((last - first + 1) / FULL_LINES))
        silent = time.monotonic() - self._last_line
        return at in (first, last) or at % every == 0 or silent > LONGEST_SILENCE

    def _facts(self) -> list[tuple[str, str]]:
        """The round in words, each with its style: method and round first."""
        assert self._run is not None
        at, rounds = self._at(), self._run.rounds
        facts = [(self._run.method, "bold"), (f"round {at:>{len(str(rounds))}}/{rounds}", "")]
        if name := self._name("accuracy"):
            facts.append((f"{name} {_percent(self._measured[name])}", "green"))
        if name := self._name("loss"):
            facts.append((f"{name} {self._measured[name]:.4g}", ""))
        if found := [f"{k} {_percent(self._measured[k])}" for k in map(self._name, OPEN_WORLD) if k]:
            facts.append((" ".join(found), "green"))
        if (spent := self._row.get("epsilon")) is not None:
            facts.append((f"epsilon {spent:.3g} (delta {self._row['delta']:g})", ""))
        if self._seconds:
            pace = sum(self._seconds) / len(self._seconds)
            costs = [
                f"{self._bytes / 1e6:.1f} MB" if self._bytes >= 5e4 else f"{self._bytes / 1e3:.1f} kB",
                f"{pace:.2f} s/round",
                f"ETA {_clock(pace * (rounds - at))}",
            ]
            facts += [(text, "dim") for text in costs]
        if counts := Counter(
            str(failure.get("kind", "failed")) for failure in self._row.get("failures") or ()
        ):
            facts.append((", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())), "red"))
        return facts

    def _at(self) -> int:
        return int(self._row.get("round", self._run.start_round if self._run else 0))

    def _open(self) -> None:
        if self.mode != "rich" or self._live is not None:
            return
        self._live = Live(
            self._view(), console=self.console, auto_refresh=True, refresh_per_second=4, transient=True
        )
        outputs = (sys.stdout, sys.stderr)
        self._live.start()
        for handler in logging.getLogger().handlers:  # else log lines would tear the live view
            if isinstance(handler, logging.StreamHandler) and handler.stream in outputs:
                old = handler.setStream(sys.stderr if handler.stream is outputs[1] else sys.stdout)
                if old is not None:
                    self._redirected.append((handler, old))

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected = []

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._view())

    def _view(self) -> Group:
        """Method, bar and round; below, what fits on 80 columns; below, the stage if one is under way."""
        lines: list[RenderableType] = []
        if self._run is not None:
            method, progress, *rest = [Text(*fact) for fact in self._facts()]
            grid = Table.grid(padding=(0, 2))
            grid.add_row(
                method, ProgressBar(total=self._run.rounds, completed=self._at(), width=30), progress
            )
            lines += [grid, Text("  ").join(rest)]
        if self._phase:
            lines.append(Text(f"{self._phase} ...", style="italic"))
        return Group(*lines)

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def _failures(row: Row) -> list[Text]:
    """A line per client that failed or refused; simulated dropouts are only counted."""
    found = [f for f in row.get("failures") or () if not str(f.get("kind")).startswith("drop")]
    lines = [_failure(int(row["round"]), failure) for failure in found[:SHOWN_FAILURES]]
    if len(found) > SHOWN_FAILURES:
        lines.append(
            Text(f"round {row['round']}: {len(found) - SHOWN_FAILURES} more, see metrics.jsonl", "red")
        )
    return lines


def _failure(at: int, failure: Mapping[str, Any]) -> Text:
    kind = str(failure.get("kind", "failed"))
    colour = "yellow" if kind.startswith("refus") else "bold red"
    where = f"round {at}: client {failure.get('client')} "
    return Text.assemble(where, (kind, colour), f": {headline(str(failure.get('reason', '')))}")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
