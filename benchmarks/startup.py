"""Seconds from the start of the command to its first finished round and to its end, and what they go to.

A round is finished when its row is in metrics.jsonl. Stages are the lines of the plain console, with the time at which
they came; ``--imports`` adds the slowest imports. The first start of all, which may compile, is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "fedsim.cli"]
LIMITS = {"serial": 3.0, "ray": 2.5}  # seconds wanted on a calm machine


def first_round(engine: str, extra: list[str]) -> tuple[float, float, list[tuple[float, str]]]:
    """Seconds until the first row is written and until the command has ended, and the time of each line of output."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "run", "metrics.jsonl")
        settings = [f"engine={engine}", "rounds=2", f"dir={rows.parent}", "tracker.console.mode=plain"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*COMMAND, *settings, "tracker.plots=false", *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines: list[tuple[float, str]] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append((time.perf_counter() - start, line.rstrip()))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while not (rows.exists() and rows.stat().st_size):
                if process.poll() not in (None, 0):
                    reader.join(5)
                    raise RuntimeError("\n".join(text for _, text in lines) or "the command failed")
                time.sleep(0.005)
            seconds = time.perf_counter() - start
            process.wait(60)
            ended = time.perf_counter() - start
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        reader.join(5)
        return seconds, ended, lines


def imports(engine: str, top: int) -> list[tuple[float, str]]:
    """The ``top`` modules by seconds spent in them, what they import excluded, summed per package."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-X",
            "importtime",
            *COMMAND[1:],
            f"engine={engine}",
            "rounds=1",
            f"dir={folder}/run",
        ]
        done = subprocess.run(
            [*command, "tracker=quiet"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
    packages: dict[str, float] = {}
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", done.stderr):
        package = name.split(".")[0]
        packages[package] = packages.get(package, 0.0) + int(own) / 1e6
    return sorted(((s, p) for p, s in packages.items()), reverse=True)[:top]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", default="serial,ray")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    for engine in args.engines.split(","):
        first_round(engine, args.overrides)
        runs = [first_round(engine, args.overrides) for _ in range(args.times)]
        seconds, ended = [s for s, _, _ in runs], [e for _, e, _ in runs]
        print(
            f"{engine:<7} {statistics.median(seconds):.2f} s to the first round "
            f"({min(seconds):.2f}-{max(seconds):.2f}, {len(runs)} times; wanted {LIMITS[engine]:g}), "
            f"{statistics.median(ended):.2f} s to the end ({min(ended):.2f}-{max(ended):.2f}); "
            f"1-minute load {os.getloadavg()[0]:.1f}"
        )
        for at, text in min(runs)[2]:
            print(f"  {at:6.2f} s  {text[:100]}")
        if args.imports:
            for spent, package in imports(engine, 12):
                print(f"  import {package:<20} {spent:.2f} s")


if __name__ == "__main__":
    main()
