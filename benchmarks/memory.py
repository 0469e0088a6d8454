"""Memory of a run whose data were handed over as tensors: workload L, 614 MB in pieces of one tensor.

    python -m benchmarks.memory --engine ray engine.early=false

The largest proportional set size (PSS: shared pages are divided among those who map them) of the whole process tree,
looked at every 50 ms, less the data; and what each process had at that moment: all, and what is its own alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sides import settings
from benchmarks.workloads import WORKLOADS

MARK = "result: "
Seen = list[tuple[str, int, int]]  # name, PSS and private bytes of each process


class Peak(threading.Thread):
    """The largest PSS of this process with all its descendants, and their shares of it."""

    def __init__(self, every: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.most, self.shares, self._every, self._done = 0, Seen(), every, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._done.wait(self._every):
            shares = [share for p in (me, *me.children(recursive=True)) if (share := of(p))]
            if (total := sum(pss for _, pss, _ in shares)) > self.most:
                self.most, self.shares = total, shares

    def stop(self) -> int:
        """What was seen."""
        self._done.set()
        self.join()
        return self.most


def of(process: psutil.Process) -> tuple[str, int, int] | None:
    """A process as it is at the moment; ``None`` if it has ended."""
    try:
        words = [Path(word).name for word in process.cmdline()]
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except (psutil.Error, OSError):
        return None
    size = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines[1:]}
    scripts = [word for word in words[1:] if word.endswith(".py")]
    name = (scripts or [word for word in words if not word.startswith("-")] or ["?"])[0]
    return name, size["Pss"], size["Private_Dirty"] + size["Private_Clean"]


def run(engine: str, rounds: int, overrides: list[str]) -> dict[str, Any]:
    """Peak and shares of a run in this process."""
    import fedsim

    work = WORKLOADS["L"]
    x, y = work.data()
    n, peak = work.samples, Peak()
    options = [
        f"engine={engine}",
        *(["engine.workers=2"] if engine == "ray" else []),
        *settings(work, rounds),
    ]
    options.remove("tracker=quiet")
    with tempfile.TemporaryDirectory() as out:
        peak.start()
        fedsim.simulate(
            [*options, "tracker.console.mode=quiet", f"out={out}", *overrides],
            model=work.model(),
            clients=[(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)],
        )
    return {"data": x.nbytes + y.nbytes, "peak": peak.stop(), "shares": peak.shares}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", default="ray", choices=("serial", "ray"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.child:
        print(MARK + json.dumps(run(args.engine, args.rounds, overrides)), flush=True)
        os._exit(0)
    command = [sys.executable, "-m", "benchmarks.memory", "--child", "--engine", args.engine]
    done = subprocess.run(
        [*command, "--rounds", str(args.rounds), *overrides], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(done.stderr)
    found = json.loads(lines[0].removeprefix(MARK))
    over = (found["peak"] - found["data"]) / 1e9
    print(
        f"{args.engine}: peak PSS {found['peak'] / 1e9:.2f} GB, data + {over:.2f}; at that moment, MB (own alone):"
    )
    for name, pss, own in sorted(found["shares"], key=lambda share: -share[1]):
        print(f"  {pss / 1e6:7.1f}  ({own / 1e6:6.1f})  {name}")


if __name__ == "__main__":
    main()
