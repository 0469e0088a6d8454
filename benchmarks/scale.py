"""Cost follows the cohort, not the population; and memory stays flat.

Population: median seconds a round with many registered clients over that with few, runs in turns. Memory: proportional
set size (PSS: shared pages are divided among those who map them) of the whole process tree over the rounds of one run,
and the slope of its second half.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

import fedsim

SAMPLES = 20  # per client


def equal(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A partition: each client holds the same number of consecutive samples, wrapping around the data."""
    rows = np.arange(num_clients * SAMPLES, dtype=np.int64) % len(labels)
    return list(rows.reshape(num_clients, SAMPLES))


def settings(engine: str, method: str, clients: int, rounds: int, out: str) -> list[str]:
    return [
        f"strategy={method}",
        f"engine={engine}",
        f"rounds={rounds}",
        f"num_clients={clients}",
        "clients_per_round=50",
        "data=blobs",
        "partition=iid",
        "partition._target_=benchmarks.scale.equal",
        "client.epochs=1",
        "client.batch_size=10",
        "evaluation.every=1000000",
        "checkpoint.every=0",
        "tracker=quiet",
        f"out={out}",
    ]


def pss() -> float:
    """MB of this process and all its descendants, shared pages counted once."""
    total = 0
    me = psutil.Process()
    for p in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += p.memory_full_info().pss
    return total / 2**20


def population(engine: str, few: int, many: int, rounds: int, pairs: int) -> None:
    """Print the ratio of round times."""
    medians: dict[int, list[float]] = {few: [], many: []}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(pairs):
            for clients in (few, many):
                result = fedsim.simulate(settings(engine, "fedavg", clients, rounds, out))
                medians[clients].append(statistics.median(r["seconds"] for r in result.rows[5:-1]))
    ratios = sorted(b / a for a, b in zip(medians[few], medians[many], strict=True))
    print(
        f"{engine:<7} {many} against {few} registered clients, cohort 50: round time x{statistics.median(ratios):.3f} "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f}, {pairs} pairs), {statistics.median(medians[few]) * 1e3:.1f} ms a round",
        flush=True,
    )


def memory(engine: str, method: str, clients: int, rounds: int) -> None:
    """Print the memory at intervals and its slope."""
    seen: list[tuple[int, float]] = []

    class Watch:
        def round(self, row: dict[str, Any], clients: Any) -> None:
            if row["round"] % 10 == 0:
                seen.append((row["round"], pss()))

    torch.manual_seed(0)
    x: Tensor = torch.randn(clients * SAMPLES, 784)
    y = torch.randint(10, (len(x),))
    with tempfile.TemporaryDirectory() as out:
        given = [(x[i : i + SAMPLES], y[i : i + SAMPLES]) for i in range(0, len(x), SAMPLES)]
        handed = ("partition", "data=")
        options = settings(engine, method, clients, rounds, out)
        common = [s for s in options if not s.startswith(handed)]
        fedsim.simulate(common, clients=given, callbacks=[Watch()])
    half = np.array(seen[len(seen) // 2 :])
    slope = np.polyfit(half[:, 0], half[:, 1], 1)[0] * 100
    shown = ", ".join(f"{r}: {m:.0f}" for r, m in seen[:: max(1, len(seen) // 6)])
    print(f"{engine:<7} {method:<9} PSS in MB by round {shown}; slope {slope:+.1f} MB/100 rounds", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", default="serial,ray")
    parser.add_argument("--parts", default="population,memory")
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--many", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=60, help="of the population runs")
    parser.add_argument("--memory-rounds", type=int, default=200)
    args = parser.parse_args()
    for engine in args.engines.split(","):
        if "population" in args.parts:
            population(engine, args.few, args.many, args.rounds, args.pairs)
        if "memory" in args.parts:
            for method in ("fedavg", "fedspeed"):
                memory(engine, method, 100, args.memory_rounds)


if __name__ == "__main__":
    main()
