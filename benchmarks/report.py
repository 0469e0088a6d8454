"""Seconds that ``fedsim report`` takes for many runs, from the command's start to its end.

    python -m benchmarks.report --runs 300 --seeds 15

Runs of 50 rounds on ten clients of digits: five methods, with as many learning rates as ``--seeds`` leaves runs for;
clients are measured every ten rounds. One run of each method is computed; the others are its folder again with another
seed, learning rate, partition and, for every number measured, another value. ``--keep DIR`` leaves them there;
``--profile`` says where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fedsim
from fedsim.cli.main import command
from fedsim.data.shards import Shards

METHODS = ("fedavg", "fedprox", "scaffold", "fedspeed", "fedsam")
SETTINGS = (
    "rounds=50", "num_clients=10", "clients_per_round=5", "model=mlp", "model.hidden=[8]", "client.epochs=1",
    "evaluation.holdout=0.2", "evaluation.clients_every=10", "engine=serial", "tracker.console.mode=quiet",
)  # fmt: skip


def fabricate(place: Path, runs: int, seeds: int, more: Sequence[str]) -> None:
    """Folders of ``runs`` runs, of which one of each method is real; ``more`` settings of these."""
    made, count = 0, -(-runs // (len(METHODS) * seeds))
    rates = [float(f"{lr:.4g}") for lr in np.geomspace(0.01, 0.3, count)]
    for method in METHODS:
        first = place / "first" / method
        fedsim.simulate([*SETTINGS, f"strategy={method}", f"dir={first}", *more])
        for lr in rates:
            for seed in range(seeds):
                if made < runs:
                    copied(first, place / "runs" / f"{method}-s{seed}-{made:08x}", seed, lr)
                    made += 1
    shutil.rmtree(place / "first")


def copied(first: Path, to: Path, seed: int, lr: float) -> None:
    """The run in ``first`` as if it had had another seed and learning rate."""
    shutil.copytree(first, to, ignore=shutil.ignore_patterns("checkpoint"))
    rng = np.random.default_rng([seed, int(1000 * lr)])
    text = (to / "config.yaml").read_text().replace(str(first), str(to))
    text = re.sub(r"^seed: 0$", f"seed: {seed}", text, flags=re.MULTILINE)
    text = re.sub(r"^  lr: .*$", f"  lr: {lr}", text, count=1, flags=re.MULTILINE)
    (to / "config.yaml").write_text(text)
    for name in ("metrics.jsonl", "clients.jsonl"):
        rows = [json.loads(line) for line in (to / name).read_text().splitlines()]
        (to / name).write_text("".join(json.dumps(moved(row, rng, lr)) + "\n" for row in rows))
    shards = Shards.load(to / "partition.npz")
    order = np.random.default_rng(seed).permutation(len(shards))
    shards = Shards.of([np.sort(shards.part(int(c))) for c in order])
    shards.save(to / "partition.npz")
    hashes = {"seed": seed, "partition_hash": shards.hash(), "data_hash": "0" * 64}
    for name in ("summary.json", "provenance.json"):
        facts: Any = json.loads((to / name).read_text())
        for one in facts if isinstance(facts, list) else [facts]:
            one |= {k: v for k, v in hashes.items() if k in one}
        (to / name).write_text(json.dumps(facts))


def moved(row: dict[str, Any], rng: np.random.Generator, lr: float) -> dict[str, Any]:
    """A row with other accuracies, and another hash of the weights."""
    shares = [k for k in row if k.endswith("accuracy")] + (
        ["value"] if "accuracy" in str(row.get("metric")) else []
    )
    row |= {
        k: min(1.0, max(0.0, row[k] - abs(0.05 * np.log10(lr / 0.1)) + 0.01 * rng.normal())) for k in shares
    }
    return row | ({"weights_hash": rng.bytes(32).hex()} if "weights_hash" in row else {})


def measure(runs: Path, out: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of the command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, "-m", "fedsim.cli", "report", str(runs), "--out", str(out)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300, help="further arguments are settings of the runs")
    parser.add_argument("--seeds", type=int, default=15, help="of each method and learning rate")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--profile", action="store_true")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = args.keep or Path(scratch)
        if not (place / "runs").is_dir():
            fabricate(place, args.runs, args.seeds, more)
        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(command, ["report", str(place / "runs"), "--out", str(place / "report")])
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
            return
        for _ in range(args.repeat):
            seconds, cpu = measure(place / "runs", place / "report")
            print(f"{args.runs} runs: {seconds:.2f} s, {cpu:.2f} CPU s", flush=True)


if __name__ == "__main__":
    main()
