"""What a framework adds to the work: clients per second against the bare loop, in alternating segments of one run.

Each framework runs in its own process together with a bare loop of as many processes: some rounds of the one, the same
rounds (same cohorts) of the other, and so on, while the other side idles. The first segment of each is a warm-up.
Reported is the median over pairs of (bare seconds / framework seconds): the speed relative to the bare loop;
the same for CPU seconds of the whole process tree; and the loss that both end at, which must agree to sampling noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch

from benchmarks.bare import Bare
from benchmarks.pairs import HEADER, Pairs, Result
from benchmarks.sides import SIDES
from benchmarks.workloads import WORKLOADS, scaled
from fedsim.cli.main import ENVIRONMENT

MARK = "result: "


def measure(name: str, workload: str, pairs: int, segment: int | None, extra: list[str]) -> Result:
    """One framework on one workload, in this process."""
    torch.set_num_threads(1)
    processes, run = SIDES[name]
    work = scaled(WORKLOADS[workload], segment)
    with Bare(work, processes) as bare:
        timed = Pairs(bare, work, pairs)
        weights = run(extra, timed)
        return timed.result(name, processes, weights)


def child(name: str, workload: str, args: argparse.Namespace) -> Result | None:
    """The same in a process of its own, so that no framework sees another's settings."""
    python = args.pfl_python if name == "pfl" and args.pfl_python else sys.executable
    command = [python, "-m", "benchmarks.overhead", "--only", name, "--workloads", workload]
    segment = ["--segment", str(args.segment)] if args.segment else []
    command += ["--pairs", str(args.pairs), *segment, *args.overrides]
    environment = {**ENVIRONMENT, **os.environ} if name.startswith("fedsim") and not args.plain else None
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return Result(**json.loads(line.removeprefix(MARK)))
    reason = (done.stderr.strip().splitlines() or ["?"])[-1]
    print(f"{workload}  {name:<14} failed or is not installed: {reason}", flush=True)
    if args.verbose:
        print(done.stderr, file=sys.stderr)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", default="M,L,R")
    parser.add_argument("--sides", default="fedsim-ray,fedsim-serial")
    parser.add_argument("--with", dest="others", default="", help="flower,pfl")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--segment", type=int, help="rounds timed at a stretch; default: by workload")
    parser.add_argument(
        "--pfl-python", help="interpreter of an environment that has pfl and fedsim's dependencies"
    )
    parser.add_argument(
        "--plain", action="store_true", help="without the environment that the fedsim command gives itself"
    )
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="fedsim settings, e.g. engine.chunks=8")
    args = parser.parse_args()
    if args.only:
        print(
            MARK + measure(args.only, args.workloads, args.pairs, args.segment, args.overrides).dump(),
            flush=True,
        )
        os._exit(0)  # some frameworks leave threads behind
    print(HEADER)
    for workload in args.workloads.split(","):
        for name in filter(None, f"{args.sides},{args.others}".split(",")):
            if result := child(name, workload, args):
                print(result.line(), flush=True)


if __name__ == "__main__":
    main()
