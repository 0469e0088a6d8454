"""Time kept in alternating segments of a framework and the bare loop, and what came of it."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import psutil
import torch
from torch import Tensor

from benchmarks.bare import Bare
from benchmarks.workloads import Workload


@dataclass
class Result:
    """One framework on one workload. Ratios are bare time / framework time, that is speed relative to the bare loop."""

    workload: str
    name: str
    processes: int
    wall: list[float]  # seconds per round of each segment
    bare: list[float]
    cpu: list[float]  # CPU seconds per round of each segment, whole process tree
    bare_cpu: list[float]
    loss: float = float("nan")
    bare_loss: float = float("nan")
    cohort: int = 0
    form: str = ""  # of the bare loop's gradient

    def line(self) -> str:
        """A row of the table."""
        ratios = sorted(b / a for a, b in zip(self.wall, self.bare, strict=True))
        cpus = [b / a for a, b in zip(self.cpu, self.bare_cpu, strict=True)]
        rate = self.cohort / statistics.median(self.wall)
        return (
            f"{self.workload}  {self.name:<14} {self.processes}  {rate:9.1f}  "
            f"{self.cohort / statistics.median(self.bare):9.1f}  "
            f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}, {len(ratios)} pairs)  "
            f"{statistics.median(cpus):5.2f}  {statistics.median(self.cpu):6.3f}  "
            f"{self.loss:.4f} / {self.bare_loss:.4f}  {self.form}"
        )

    def dump(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))


HEADER = (
    "w  framework      p  clients/s   bare c/s  speed / bare               CPU    "
    "cpu s   loss / bare      bare gradient\n"
    "                                                                      ratio  /round"
)


@dataclass
class Pairs:
    """Alternates ``segment`` rounds of a framework with as many of the bare loop.

    The framework calls ``round_done`` after each of its rounds; all of its own time between two calls counts. The first
    segment of each side is a warm-up and is not counted.
    """

    bare: Bare
    work: Workload
    pairs: int
    wall: list[float] = field(default_factory=list)
    bare_wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    bare_cpu: list[float] = field(default_factory=list)
    _rounds: list[Sequence[int]] = field(default_factory=list)
    _clock: float = 0.0
    _cpu: float = 0.0
    _fresh: bool = True

    @property
    def rounds(self) -> int:
        """Rounds that the framework must run."""
        return (self.pairs + 1) * self.work.segment

    def round_done(self, cohort: Sequence[int] | None = None) -> None:
        """A framework round is done; ``cohort`` is replayed by the bare loop (default: a random one)."""
        if cohort is None:
            cohort = torch.randperm(self.work.clients)[: self.work.cohort].tolist()
        self._rounds.append(cohort)
        if len(self._rounds) < self.work.segment:
            return
        wall = time.perf_counter() - self._clock
        cpu = tree_cpu(exclude=self.bare.pids) - self._cpu
        before, start = self.bare.cpu(), time.perf_counter()
        for c in self._rounds:
            self.bare.round(c)
        bare_wall = time.perf_counter() - start
        bare_cpu = self.bare.cpu() - before
        if not self._fresh:
            n = len(self._rounds)
            self.wall.append(wall / n)
            self.cpu.append(cpu / n)
            self.bare_wall.append(bare_wall / n)
            self.bare_cpu.append(bare_cpu / n)
        self._rounds, self._fresh = [], False
        self._cpu, self._clock = tree_cpu(exclude=self.bare.pids), time.perf_counter()

    def result(self, name: str, processes: int, weights: dict[str, Tensor]) -> Result:
        """What was measured, with the loss that both sides ended at."""
        return Result(
            self.work.name,
            name,
            processes,
            self.wall,
            self.bare_wall,
            self.cpu,
            self.bare_cpu,
            self.work.loss(weights),
            self.work.loss(self.bare.state_dict()),
            self.work.cohort,
            self.bare.form,
        )


def tree_cpu(exclude: Sequence[int] = ()) -> float:
    """CPU seconds of this process and all its descendants so far, without those in ``exclude``."""
    total = 0.0
    me = psutil.Process()
    for p in [me, *me.children(recursive=True)]:
        if p.pid not in exclude:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = p.cpu_times()
                total += times.user + times.system
    return total
