"""Ray on three nodes of one machine against Ray on one: the same run, the same bits, how much longer a round?

    python -m benchmarks.nodes --workload M

The cluster is a head without CPUs and two nodes with one each, with ports of their own. A worker on another machine
than the driver's has no pipe to it, so that calls and vectors go through Ray and its object store; here all nodes are
on one machine, so ``--far`` (the default) takes the pipes away, as the network would. Wall and CPU
seconds of a round, runs in turns; CPU seconds are those of the run's processes, Ray's own included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import psutil

from benchmarks.sides import settings
from benchmarks.workloads import WORKLOADS

MARK = "result: "


def run(workload: str, address: str | None, rounds: int, far: bool) -> dict[str, Any]:
    """Seconds and CPU seconds of the rounds but the first five, and the last hash, in this process."""
    import fedsim
    from fedsim.engine.ray.transport.driver import Transport

    if far and address:
        Transport.open = lambda self, worker: None  # type: ignore[method-assign]
    work = WORKLOADS[workload]
    x, y = work.data()
    n, timed = work.samples, []

    class RoundTimer:
        def round(self, row: dict[str, Any], clients: Any) -> None:
            timed.append((row["seconds"], cpu(address is not None), row["weights_hash"]))

    with tempfile.TemporaryDirectory() as out:
        fedsim.simulate(
            [
                "engine=ray",
                "engine.workers=2",
                "engine.early=false",
                *([f"engine.address={address}"] if address else []),
                *settings(work, rounds),
                f"out={out}",
            ],
            model=work.model(),
            clients=[(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)],
            callbacks=[RoundTimer()],
        )
    used = [b[1] - a[1] for a, b in zip(timed[5:], timed[6:], strict=False)]
    return {
        "wall": statistics.median(s for s, _, _ in timed[5:]),
        "cpu": statistics.mean(used),
        "hash": timed[-1][2],
    }


def cpu(whole: bool) -> float:
    """CPU seconds so far of this process and its descendants; ``whole``: of its parent's, who has started the nodes."""
    total, root = 0.0, psutil.Process(os.getppid() if whole else os.getpid())
    for p in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = p.cpu_times()
            total += times.user + times.system
    return total


def child(args: argparse.Namespace, address: str | None) -> dict[str, Any]:
    """``run`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.nodes", "--child", "--workload", args.workload]
    command += ["--rounds", str(args.rounds), *(["--address", address] if address else [])]
    command += ["--far" if args.far else "--no-far"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(lines[0].removeprefix(MARK))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", default="M", choices=sorted(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--far", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(MARK + json.dumps(run(args.workload, args.address, args.rounds, args.far)), flush=True)
        return
    from ray.cluster_utils import Cluster

    from fedsim.engine.ray.cluster import INLINE

    os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE))  # as docs/cluster.md says

    store = 300 << 20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": store},
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=store)
        pairs = [(child(args, None), child(args, cluster.address)) for _ in range(args.pairs)]
    finally:
        cluster.shutdown()
    assert len({found["hash"] for pair in pairs for found in pair}) == 1, "other bits"
    for what in ("wall", "cpu"):
        ratios = sorted(three[what] / one[what] for one, three in pairs)
        ones = statistics.median(one[what] for one, _ in pairs)
        print(
            f"{args.workload}: three nodes against one, {what} seconds of a round x{statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f}, {len(pairs)} pairs), one node {1e3 * ones:.1f} ms; wanted 1.3"
        )


if __name__ == "__main__":
    main()
