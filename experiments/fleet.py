"""Time to accuracy on heterogeneous phones: FedAvg, FedProx with partial work, FedBuff, and what else a server can do.

    python -m experiments.fleet --data ../shared/data/mnist --traces ../shared/data/traces

LeNet on MNIST, writers grouped into 100 clients, 10 of them at work at a time; phones, links and charging times are
measured ones (configuration ``experiment=fleet``). All methods see the same fleet. The command can be stopped and
started again; finished runs are skipped. Further arguments are overrides for every run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedsim.cli.main import command
from fedsim.config.words import last_of_each

DEADLINE = "system.deadline=4"  # virtual seconds
FIRST = ("system.over_selection=1.3", "system.stragglers=drop")
METHODS = {
    "fedavg": ("strategy=fedavg",),
    "fedavg_first": ("strategy=fedavg", *FIRST),  # of 13 asked the first 10
    "fedavg_deadline": ("strategy=fedavg", DEADLINE, "system.stragglers=drop"),
    "fedprox_partial": ("strategy=fedprox", "strategy.mu=0.01", DEADLINE, "system.stragglers=partial"),
    "fedbuff": ("strategy=fedbuff", "strategy.buffer=10", "strategy.concurrency=10"),
    "fedasync": ("strategy=fedasync", "strategy.answers_per_round=10", "strategy.concurrency=10"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of MNIST's files and writers.parquet"
    )
    parser.add_argument("--traces", type=Path, required=True, help="folder of the device traces")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of %(default)s")
    args, overrides = parser.parse_known_args()
    overrides += [f"data.path={args.data}", f"system.traces={args.traces}"]
    codes = [
        command(
            last_of_each(
                ["-m", "experiment=fleet", f"method={name}", *METHODS[name], f"seed={args.seeds}", *overrides]
            )
        )
        for name in args.methods.split(",")
    ]
    out = next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs")
    return max(*codes, command(["report", f"{out}/fleet"]))


if __name__ == "__main__":
    sys.exit(main())
