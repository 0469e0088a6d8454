"""Memory and time of many peers: N models, momentum and mixing on one machine.

    python -m benchmarks.peers --peers 1000 --rounds 3

An MLP of 101 614 parameters on digits, one batch a round, a random 8-regular graph, Ray workers. Memory is the
proportional set size (shared pages counted once) of the whole process tree, sampled every two seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading

import fedsim
from benchmarks.scale import pss


class Peak(threading.Thread):
    """Samples the memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(2):
            self.most = max(self.most, pss())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="ray", choices=("ray", "serial"))
    args, more = parser.parse_known_args()
    peak = Peak()
    peak.start()
    with tempfile.TemporaryDirectory() as out:
        settings = [
            "experiment=gossip_digits",
            "model.model.hidden=[300,264]",
            f"engine={args.engine}",
            *(["engine.workers=2", "engine.store_mb=500"] if args.engine == "ray" else []),
            f"num_clients={args.peers}",
            f"clients_per_round={args.peers}",
            f"rounds={args.rounds}",
            "partition=everything",
            "evaluation.every=1000000",
            "evaluation.target=null",
            "evaluation.stop_at_target=false",
            "strategy.evaluate_peers=20",
            "tracker=quiet",
            f"out={out}",
        ]
        rows = fedsim.simulate([*settings, *more]).rows
    peak.done.set()
    peak.join()
    seconds = statistics.median(r["seconds"] for r in rows[:-1] or rows)
    print(
        f"{args.engine}: {args.peers} peers x 101614 parameters, {args.rounds} rounds: "
        f"peak {peak.most:.0f} MB, {seconds:.1f} s a round"
    )


if __name__ == "__main__":
    main()
