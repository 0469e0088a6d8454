"""What clip and noise add to a round: a private run and a plain one in alternating segments.

Each runs in a process of its own through the public interface; some rounds of the one, then as many of the other, while
the other waits for its turn. The first segment of each is a warm-up. Reported is the median over pairs of
(private seconds / plain seconds), and the same for CPU seconds of the whole process tree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.pairs import tree_cpu
from benchmarks.sides import settings
from benchmarks.workloads import WORKLOADS, Workload, scaled
from fedsim.cli.main import ENVIRONMENT

KINDS: Mapping[str, Sequence[str]] = {
    "plain": (),
    "client": ("privacy=client", "privacy.z=1", "privacy.delta=1e-6", "privacy.clip=0.05"),
    "adaptive": ("privacy=client", "privacy.z=1", "privacy.delta=1e-6", "privacy.clip=adaptive"),
    "local": ("privacy=local", "privacy.z=1", "privacy.delta=1e-6", "privacy.clip=0.05"),
}
WAIT, TIMED = "wait", "timed "


def serve(kind: str, engine: str, work: Workload, pairs: int) -> None:
    """Run the workload, a segment at each line of the input; prints the seconds of each."""
    import fedsim

    torch.set_num_threads(1)
    x, y = work.data()
    n, rounds = work.samples, (pairs + 1) * work.segment
    output, clock = sys.stdout, [0.0, 0.0]
    done = 0

    class Turns:
        def round(self, row: dict[str, Any], clients: Sequence[Any]) -> None:
            nonlocal done
            done += 1
            if done % work.segment:
                return
            if done > work.segment:
                spent = [time.perf_counter() - clock[0], tree_cpu() - clock[1]]
                output.write(f"{TIMED}{json.dumps([s / work.segment for s in spent])}\n")
            output.write(f"{WAIT}\n")
            output.flush()
            sys.stdin.readline()
            clock[:] = [time.perf_counter(), tree_cpu()]

    workers = ["engine.workers=2"] if engine == "ray" else []
    with tempfile.TemporaryDirectory() as out:
        given = [
            f"engine={engine}",
            *workers,
            *settings(work, rounds),
            "strategy.weighting=uniform",
            f"out={out}",
        ]
        fedsim.simulate(
            [*given, *KINDS[kind]],
            model=work.model(),
            clients=[(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)],
            callbacks=[Turns()],
        )


class Side:
    """One of the two processes."""

    def __init__(self, kind: str, args: argparse.Namespace):
        words = [
            "--only",
            kind,
            "--engine",
            args.engine,
            "--workload",
            args.workload,
            "--pairs",
            str(args.pairs),
        ]
        words += ["--segment", str(args.segment)] if args.segment else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.private", *words],
            env={**ENVIRONMENT, **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
        )
        self.times: list[list[float]] = []
        self.turn(first=True)

    def turn(self, first: bool = False) -> None:
        """One segment."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if not first:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(TIMED):
                self.times.append(json.loads(line.removeprefix(TIMED)))
            if line.strip() == WAIT:
                return
        raise SystemExit("a side ended early; --verbose says why")

    def end(self) -> None:
        """Let it finish."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", default="M", choices=WORKLOADS)
    parser.add_argument("--engine", default="serial", choices=("serial", "ray"))
    parser.add_argument("--kinds", default="client,adaptive", help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--segment", type=int, help="rounds timed at a stretch; default: by workload")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        serve(args.only, args.engine, scaled(WORKLOADS[args.workload], args.segment), args.pairs)
        sys.stdout.flush()
        os._exit(0)
    for kind in args.kinds.split(","):
        plain, private = Side("plain", args), Side(kind, args)
        for pair in range(args.pairs):
            for side in (plain, private) if pair % 2 == 0 else (private, plain):
                side.turn()
        ratios = [
            sorted(b[at] / a[at] for a, b in zip(plain.times, private.times, strict=True)) for at in (0, 1)
        ]
        for side in (plain, private):
            side.end()
        wall, cpu = ratios
        quarter = len(wall) // 4
        print(
            f"{args.workload} {args.engine} {kind}: time x{statistics.median(wall):.3f} "
            f"(quartiles {wall[quarter]:.3f}-{wall[-1 - quarter]:.3f}, {len(wall)} pairs), CPU "
            f"x{statistics.median(cpu):.3f}, {statistics.median(t[0] for t in plain.times):.4f} s a plain round",
            flush=True,
        )


if __name__ == "__main__":
    main()
