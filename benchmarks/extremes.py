"""What a round costs at both ends: ten thousand tiny clients, and three clients of 200 million parameters.

    python -m benchmarks.extremes            # under ten minutes on two cores

**Cohorts**: an MLP 20-16-10 and one batch of ten samples a client, cohorts of 10 to 10 000; CPU seconds of the whole
process tree and wall seconds a round, in turns with the bare loop. *Beside its steps*: CPU time of a client in a round
less that of its gradient steps alone, which are measured in the same process.

**Large**: an MLP 1024-13600-13600-10, 199 million parameters, three clients of three batches; the same, and the largest
proportional set size (PSS: shared pages are divided among those who map them) of each side's process tree, alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.bare import Bare, Local
from benchmarks.memory import Peak
from benchmarks.pairs import Pairs
from benchmarks.sides import SIDES
from benchmarks.workloads import Workload
from fedsim.models import MLP

MARK = "result: "
COHORTS = (10, 100, 1000, 10_000)


@dataclass(frozen=True)
class Sized(Workload):
    """A workload whose model is an MLP with these hidden layers."""

    hidden: tuple[int, ...] = ()

    def model(self) -> nn.Module:
        """The initial model, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return MLP(self.shape, 10, list(self.hidden))


def tiny(cohort: int) -> Sized:
    """One batch a client."""
    segment = max(1, 300 // cohort)
    return Sized("tiny", max(COHORTS), 10, cohort, 10, (20,), 0.05, segment, hidden=(16,))


LARGE = Sized("large", 3, 24, 3, 8, (1024,), 0.001, 1, hidden=(13_600, 13_600))


def steps_alone(work: Workload) -> float:
    """CPU seconds of a client's gradient steps in the bare loop's faster form, and nothing else."""
    torch.set_num_threads(1)
    local, (x, y) = Local(work), work.data()
    local.use(local.calibrate(x, y))
    batches = [(x[rows], y[rows]) for rows in torch.arange(work.samples).split(work.batch)]
    turns = []
    for _ in range(9):
        start = time.process_time()
        for _ in range(100):
            for part in batches:
                local.step(*part)
        turns.append((time.process_time() - start) / 100)
    return statistics.median(turns)


def measure(side: str, work: Sized, pairs: int) -> dict[str, Any]:
    """One side against the bare loop, in this process."""
    torch.set_num_threads(1)
    processes, run = SIDES[side]
    with Bare(work, processes) as bare:
        timed = Pairs(bare, work, pairs)
        weights = run([], timed)
        found: dict[str, Any] = json.loads(timed.result(side, processes, weights).dump())
        return found


class Rounds:
    """Stands for ``Pairs`` where nothing is timed."""

    def __init__(self, work: Sized, rounds: int) -> None:
        self.work, self.rounds = work, rounds

    def round_done(self, cohort: Any) -> None:
        """A round is done."""


def memory(side: str, work: Sized, rounds: int) -> int:
    """Peak PSS of one side alone, or of the bare loop with as many processes (``bare SIDE``)."""
    torch.set_num_threads(1)
    bare, _, name = side.rpartition(" ")
    processes, run = SIDES[name]
    peak = Peak()
    peak.start()
    if bare:
        with Bare(work, processes, "flat") as loop:
            for _ in range(rounds):
                loop.round(range(work.cohort))
    else:
        run([], Rounds(work, rounds))  # type: ignore[arg-type]
    return peak.stop()


def child(what: str, side: str, work: str, pairs: int) -> Any:
    """``measure`` or ``memory`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.extremes", "--only", what, "--sides", side, "--work", work]
    done = subprocess.run([*command, "--pairs", str(pairs)], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(done.stderr)
    return json.loads(lines[0].removeprefix(MARK))


def line(found: dict[str, Any], steps: float | None) -> str:
    """What was measured, in words."""
    med, cohort = statistics.median, found["cohort"]
    ratios = sorted(b / a for a, b in zip(found["cpu"], found["bare_cpu"], strict=True))
    text = (
        f"{found['name']:<13} cohort {cohort:>6}: {med(found['cpu']):8.4f} CPU s a round "
        f"(bare {med(found['bare_cpu']):.4f}), "
        f"{med(found['wall']):8.4f} s (bare {med(found['bare']):.4f}); bare / fedsim in CPU {med(ratios):.2f} "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f}, {len(ratios)} pairs)"
    )
    if steps is not None:
        own, bare = (1e6 * (med(found[k]) / cohort - steps) for k in ("cpu", "bare_cpu"))
        text += f"; a client beside its steps {own:.0f} us (bare {bare:.0f})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="fedsim-serial,fedsim-ray")
    parser.add_argument("--parts", default="cohorts,large")
    parser.add_argument("--pairs", type=int, default=0, help="0: 5 of cohorts, 2 of the large model")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        work = LARGE if args.work == "large" else tiny(int(args.work))
        found: Any = (measure if args.only == "measure" else memory)(args.sides, work, args.pairs)
        print(MARK + json.dumps(found), flush=True)
        os._exit(0)  # without waiting for Ray's end
    start = time.perf_counter()
    if "cohorts" in args.parts:
        steps = steps_alone(tiny(10))
        print(f"a client's gradient step alone: {1e6 * steps:.0f} us of CPU", flush=True)
        for side in args.sides.split(","):
            for cohort in COHORTS:
                print(line(child("measure", side, str(cohort), args.pairs or 5), steps), flush=True)
    if "large" in args.parts:
        for side in args.sides.split(","):
            print(line(child("measure", side, "large", args.pairs or 2), None), flush=True)
            own, bare = (child("memory", who, "large", 2) / 1e9 for who in (side, f"bare {side}"))
            print(f"{side:<13} peak PSS {own:.2f} GB, bare loop {bare:.2f} GB", flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
