"""The FedSpeed authors' comparison of federated optimisers, on CIFAR-10.

    python -m experiments.optimisers small --data ../shared/data/cifar10      about half an hour on two CPU cores
    python -m experiments.optimisers paper --data ../shared/data/cifar10      their setting; needs a GPU

``small``: LeNet, 100 clients at 10 %, Dirichlet 0.3, one local epoch, 150 rounds; all methods with seed 0, and FedAvg,
SCAFFOLD, FedDyn and FedSpeed with three seeds. ``paper``: ResNet-18 with GroupNorm, 5 local epochs, 1000 rounds,
Dirichlet 0.6, 0.3 and 0.1. Both can be stopped and started again; finished runs are skipped. Further arguments are
overrides for every run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedsim.cli.main import command
from fedsim.config.words import last_of_each

SEEDED = ("fedavg", "scaffold", "feddyn", "fedspeed")
OTHERS = ("fedprox", "fedcm", "fedadam", "fedsam", "mofedsam", "fedavgm", "fedyogi", "fedadagrad", "moon")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=("small", "paper"))
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's parquet files; default: from the hub")
    args, overrides = parser.parse_known_args()
    if args.data:
        overrides.append(f"data.path={args.data}")
    if args.size == "paper":
        methods = ",".join((*SEEDED, "fedprox", "fedadam", "fedcm", "mofedsam"))
        experiment = "cifar10_fedspeed"
        sweeps = [[f"strategy={methods}", "partition.alpha=0.6,0.3,0.1"]]
    else:
        experiment = "cifar10_small"
        sweeps = [
            [f"strategy={','.join((*SEEDED, *OTHERS))}", "seed=0"],
            [f"strategy={','.join(SEEDED)}", "seed=1,2"],
        ]
    codes = [
        command(last_of_each(["-m", f"experiment={experiment}", *sweep, *overrides])) for sweep in sweeps
    ]
    out = next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs")
    return max(*codes, command(["report", f"{out}/{experiment}"]))


if __name__ == "__main__":
    sys.exit(main())
