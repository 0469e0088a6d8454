"""What robust aggregation costs: seconds of CPU and memory beside the updates, one process, one thread.

    python -m benchmarks.aggregation --n 60 --d 1000000 --svd
    python -m benchmarks.aggregation --n 60 --d 10000000 --rules mean,flag

``read`` adds up all numbers once: no rule can be faster than one such pass. ``torch mean`` is ``updates.mean(0)``, to
which ratios refer. ``--byzfl`` adds ByzFL's form of each rule that it has, where it is installed; rules of which it
goes through all subsets are left out above 20 clients. ``svd`` is the flag aggregator written with a d x n singular
value decomposition per step.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks import byzfl_rules
from strategies import aggregators
from strategies.aggregators.rows import NEEDED

MOST = 20  # clients, for rules that go through subsets
FEW = ("mda", "smea")  # ByzFL goes through all subsets
THEIRS = {  # its classes by our names
    "mean": "Average",
    "coordinate_median": "Median",
    "trimmed_mean": "TrMean",
    "geometric_median": "GeometricMedian",
    "krum": "Krum",
    "multi_krum": "MultiKrum",
    "centered_clipping": "CenteredClipping",
    "mda": "MDA",
    "monna": "MoNNA",
    "meamed": "Meamed",
    "caf": "CAF",
    "smea": "SMEA",
}
BEFORE = {"nnm": "NNM", "arc": "ARC", "bucketing": "Bucketing", "clipping": "Clipping"}
IN_PLACE = (
    "byzfl arc",
    "byzfl clipping",
)  # they change what they are given: a copy, which is not counted; ``copy`` says what it costs


def svd_form(updates: Tensor, iterations: int = 5) -> Tensor:
    """Flag aggregation, median-norm scale, without pairs, on columns."""
    n = len(updates)
    norms = updates.norm(dim=1)
    x = (updates / norms[:, None]).T
    v = torch.zeros(n)
    for _ in range(iterations):
        y = torch.linalg.svd(x * ((1 - v).abs() + 1e-7) ** -0.25, full_matrices=False)[0][:, : (n + 2) // 2]
        v = (y.T @ x).square().sum(0)
    return norms.median() / n * (y @ (y.T @ x.sum(1)))


def measured(call: Callable[[], Any]) -> tuple[float, float, int]:
    """CPU seconds, wall seconds, and the most memory held beside what was there before, sampled every 2 ms."""
    process = psutil.Process()
    before = process.memory_info().rss
    peak, stop = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    wall, cpu = time.perf_counter(), time.thread_time()
    try:
        call()
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    finally:
        stop.set()
        thread.join()
    return cpu, wall, peak - before


def rules(n: int, wish: str | None) -> dict[str, Callable[[Tensor], Any]]:
    """Rules by name, and the mean after each pre-aggregator."""
    f = (n - 3) // 4
    names = wish.split(",") if wish else [*aggregators.RULES, *BEFORE]
    out: dict[str, Callable[[Tensor], Any]] = {}
    for name in names:
        if name in FEW and n > MOST:
            continue
        own = {"f": f} if name in NEEDED else {"s": 2} if name == "bucketing" else {}
        rule = getattr(aggregators, name)
        out[name] = (
            partial(aggregators.mean, before=[{name: own}]) if name in BEFORE else partial(rule, **own)
        )
    return out


def byzfl(n: int, wish: Sequence[str]) -> dict[str, Callable[[Tensor], Any]]:
    """ByzFL's form of these rules, as ``byzfl NAME``; pre-aggregators before its average."""
    found, f = byzfl_rules.load(), (n - 3) // 4
    out: dict[str, Callable[[Tensor], Any]] = {}
    for name in wish if found else ():
        own = {"f": f} if name in NEEDED else {"s": 2} if name == "bucketing" else {}
        if name in THEIRS:
            out[f"byzfl {name}"] = found[THEIRS[name]](**own)
        elif name in BEFORE:
            first, average = found[BEFORE[name]](**own), found["Average"]()
            out[f"byzfl {name}"] = lambda u, first=first, average=average: average(first(u))
    return out


def too_large(name: str, n: int, d: int) -> str:
    """Why a form is not tried: ByzFL's NNM copies n - f updates for each of n."""
    needed, there = 4 * n * (n - (n - 3) // 4) * d, psutil.virtual_memory().available
    if name != "byzfl nnm" or needed < there / 2:
        return ""
    return f"needs {needed / 1e9:.0f} GB of memory"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--d", type=int, default=1_000_000)
    parser.add_argument("--rules", help="comma-separated; default: all")
    parser.add_argument(
        "--svd", action="store_true", help="the plain SVD form too; slow, several times the memory"
    )
    parser.add_argument("--byzfl", action="store_true", help="ByzFL's form of each rule too")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    updates = torch.empty(args.n, args.d)
    for i, row in enumerate(updates):
        row.normal_(generator=torch.Generator().manual_seed(i))
    size = updates.numel() * 4
    calls: dict[str, Callable[[Tensor], Any]] = {"read": torch.sum, "torch mean": lambda u: u.mean(0)}
    calls |= {"copy": torch.clone} if args.byzfl else {}
    calls |= rules(args.n, args.rules)
    calls |= byzfl(args.n, list(calls)) if args.byzfl else {}
    calls |= {"svd": svd_form} if args.svd else {}
    print(f"n = {args.n}, d = {args.d}, float32, {size / 1e6:.0f} MB, best of {args.repeat}, one thread")
    print(
        "| rule | CPU s | wall s | CPU / torch mean | extra memory, % of the updates |\n|---|---|---|---|---|"
    )
    base = 0.0
    for name, call in calls.items():
        if refused := too_large(name, args.n, args.d):
            print(f"| {name} | {refused} | | | |", flush=True)
            continue
        try:
            runs = [
                measured(partial(call, updates.clone() if name in IN_PLACE else updates))
                for _ in range(1 if name == "svd" else args.repeat)
            ]
        except (
            RuntimeError
        ) as error:  # torch's quantile takes no more than 16 million numbers, NNM's copies may not fit
            if not name.startswith("byzfl "):
                raise
            print(f"| {name} | {str(error).splitlines()[0]} | | | |", flush=True)
            continue
        cpu, wall, extra = min(r[0] for r in runs), min(r[1] for r in runs), max(r[2] for r in runs)
        base = cpu if name == "torch mean" else base
        ratio = f"{cpu / base:.1f}" if base else "-"
        print(f"| {name} | {cpu:.3f} | {wall:.2f} | {ratio} | {100 * extra / size:.1f} |", flush=True)


if __name__ == "__main__":
    main()
