"""Whether two checkouts compute the same bits: the hash of the weights of several methods after each of three rounds.

``python -m benchmarks.same_bits OLD [NEW]`` prints both, method by method, and ends with 1 if any differ. Every setting
that a change of defaults could touch is given. What a checkout refuses, since it has no such setting, is said and is
no difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

COMMON = (
    "rounds=3",
    "seed=3",
    "num_clients=6",
    "clients_per_round=3",
    "engine=serial",
    "tracker=quiet",
    "model=mlp",
    "client.epochs=1",
    "client.batch_size=32",
    "client.lr=0.05",
    "client.lr_decay=0.998",
    "client.weight_decay=0.001",
    "client.clip_norm=10",
)
PEERS = ("topology=ring", "clients_per_round=6")
METHODS: dict[str, tuple[str, ...]] = {
    "fedavg": (),
    "clipped": ("strategy=fedavg", "client.clip_norm=0.5"),
    "momentum": ("strategy=fedavg", "client.momentum=0.9", "client.clip_norm=1", "client.clip=loss"),
    "nesterov": (
        "strategy=fedavg",
        "client.momentum=0.9",
        "client.nesterov=true",
        "client.decoupled=true",
        "client.schedule=cosine",
    ),
    "fedspeed": (),
    "scaffold": (),
    "feddyn": (),
    "fedadam": (),
    "fedbn": ("model.batch_norm=true",),
    "moon": (),
    "fedloge": ("strategy.sse.sparsity=0.2",),
    "ggeur": ("encoder=random_features",),
    "fraug": (
        "data=distorted_digits",
        "partition=domains",
        "model.batch_norm=true",
    ),
    "gossip": PEERS,
    "fedbuff": ("system=lognormal",),
    "flag": ("strategy=fedavg", "aggregator=flag"),
    "krum": ("strategy=fedavg", "aggregator=multi_krum", "aggregator.f=1", "clients_per_round=6"),
}
CHILD = """
import json, sys, tempfile, fedsim
for name, overrides in json.load(sys.stdin).items():
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = fedsim.simulate([*overrides, f"dir={folder}/run"])
            print(json.dumps([name, [row["weights_hash"] for row in run.rows]]), flush=True)
        except fedsim.errors.ConfigError as error:
            print(json.dumps([name, str(error)]), flush=True)
"""


def hashes(checkout: Path) -> dict[str, list[str] | str]:
    """Hash of the weights after each round, by method, as the code in ``checkout`` computes them; or why it refuses."""
    runs = {
        name: [
            *COMMON,
            *([] if any(o.startswith("strategy=") for o in more) else [f"strategy={name}"]),
            *more,
        ]
        for name, more in METHODS.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(runs),
        env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr}")
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def main() -> int:
    """Print both checkouts' hashes; 1 if they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="a checkout")
    parser.add_argument("new", type=Path, metavar="NEW", nargs="?", default=Path(), help="default: this one")
    args = parser.parse_args()
    old, new = hashes(args.old), hashes(args.new)
    different = 0
    for name in METHODS:
        both = old[name], new[name]
        refused = [
            f"{side}: {said}"
            for side, said in zip(("old", "new"), both, strict=True)
            if isinstance(said, str)
        ]
        if refused:
            print(f"{name:<10} not compared; {'; '.join(refused)}")
            continue
        for number, (a, b) in enumerate(zip(*both, strict=True), 1):
            different += a != b
            print(f"{name:<10} round {number}  {a[:16]}  {b[:16]}  {'same' if a == b else 'DIFFERENT'}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
