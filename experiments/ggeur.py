"""GGEUR against its controls, offline: what of its gain is the geometry's?

    python -m experiments.ggeur single       one domain: copies, own covariance, eigenvalue for its root, pooled data
    python -m experiments.ggeur domains      four domains: own rows alone, prototypes without shape, both steps
    python -m experiments.ggeur bases        GGEUR around other strategies, four domains
    python -m experiments.ggeur office data.path=../shared/data/office_caltech10
                                             GoogLeNet features of three real domains, controls as for ``domains``
    python -m experiments.ggeur pacs data.path=../shared/data/pacs encoder.run=<run>
                                             PACS through a network trained on CIFAR-10 (see the experiment's file)

Three seeds each, minutes on one core. Finished runs are skipped; further arguments are overrides for every run, e.g.
``seed=0,1,2,3`` or ``out=elsewhere``. Prints means and sample standard deviations over seeds. Pooled data are
those that the clients use, ten epochs a round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys

from fedsim.api import RunResult, run
from fedsim.config.compose import compose

Arms = dict[str, list[str]]
HEAD = "| method | accuracy % | mean over domains | spread | phase 0 MB up / down |\n|---|---|---|---|---|"
FILL = ["strategy=ggeur", "strategy.target=200"]
SINGLE: Arms = {
    "FedAvg": ["strategy=fedavg"],
    "copies only": [*FILL, "strategy.shape=none"],
    "own covariance": [*FILL, "strategy.shape=own"],
    "GGEUR (sqrt)": FILL,
    "GGEUR (eigenvalue)": [*FILL, "strategy.scale=eigenvalue"],
    "pooled data": ["strategy=centralised", "client.epochs=10"],
}
SPLITS: Arms = {
    "alpha 0.1, one of each class": ["partition.alpha=0.1"],
    "alpha 0.01, one of each class": ["partition.alpha=0.01"],
    "alpha 0.1, plain": ["partition.alpha=0.1", "partition.per_class=0"],
    "alpha 0.01, plain": ["partition.alpha=0.01", "partition.per_class=0"],
}
STEPS = ["strategy=ggeur", "strategy.target=50", "strategy.per_prototype=50"]
DOMAINS: Arms = {
    "FedAvg": ["strategy=fedavg"],
    "step 1": [*STEPS, "strategy.per_prototype=0"],
    "copies of prototypes": [*STEPS, "strategy.shape=none"],
    "own covariance": [*STEPS, "strategy.shape=own"],
    "GGEUR (sqrt)": STEPS,
    "GGEUR (eigenvalue)": [*STEPS, "strategy.scale=eigenvalue"],
    "pooled data": ["strategy=centralised", "client.epochs=10"],
}
SKEWS: Arms = {
    "no label skew": ["partition.alpha=null"],
    "alpha 0.1 over clients": ["partition.alpha=0.1", "partition.skew=across"],
}
MULTI = {"domains": "ggeur_domains", "office": "ggeur_office", "pacs": "ggeur_pacs_small"}
SGD = ["client=sgd", "client.lr=0.1", "client.clip_norm=null", "client.weight_decay=0", "client.lr_decay=1"]
BASES = {
    "fedavg": ["strategy=fedavg"],
    "fedprox": ["strategy=fedprox"],
    "scaffold": ["strategy=scaffold", "strategy.option=1"],
    "feddyn": ["strategy=feddyn"],
    "fedadam": ["strategy=fedadam", "strategy.server_lr=0.01"],
    "moon": ["strategy=moon"],
    "fedntd": ["strategy=fedntd"],
    "fedproto": ["strategy=fedproto", "strategy.share=model"],
    "fedavg, SGD": ["strategy=fedavg", *SGD],
    "feddyn, SGD": [
        "strategy=feddyn",
        *SGD,
    ],  # its dual wants steps that shrink with the gradient: not Adam's
}


def bases() -> Arms:
    """Every base with and without GGEUR; the option that a base needs is set in both."""
    arms: Arms = {}
    for name, own in BASES.items():
        arms[name] = own
        inner = [
            o.replace("strategy.", "strategy.base.").replace("strategy=", "strategy@strategy.base=")
            for o in own
        ]
        arms[f"{name} + GGEUR"] = [*STEPS, *inner]
    return arms


def table(experiment: str, arms: Arms, settings: Arms, seeds: list[int], overrides: list[str]) -> None:
    """Run every arm in every setting and print a row each."""
    for setting, where in settings.items():
        print(f"\n{setting}\n{HEAD}")
        for label, how in arms.items():
            runs = [one(experiment, [*where, *how, f"seed={seed}", *overrides]) for seed in seeds]
            print("|", " | ".join([label, *cells(runs)]), "|", flush=True)


def one(experiment: str, overrides: list[str]) -> RunResult:
    """One run, or what is left of it from an earlier call."""
    return run(compose([f"experiment={experiment}", "engine=serial", "tracker=quiet", *overrides]))


def cells(runs: list[RunResult]) -> list[str]:
    """Accuracy, its mean and spread over domains, and the traffic of phase 0, over seeds."""
    rows = [r.rows[-1] for r in runs]
    columns = ["accuracy", "domains/accuracy", "domains/accuracy_std"]
    out = [spread([100 * row[c] for row in rows]) if c in rows[0] else "" for c in columns]
    phase = runs[0].summary.get("phase0")
    return [*out, f"{phase['bytes_up'] / 1e6:.1f} / {phase['bytes_down'] / 1e6:.1f}" if phase else ""]


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=("single", "domains", "bases", "office", "pacs"))
    args, overrides = parser.parse_known_args()
    given = [o for o in overrides if o.startswith("seed=")]
    seeds = [int(s) for s in given[-1].removeprefix("seed=").split(",")] if given else [0, 1, 2]
    rest = [o for o in overrides if not o.startswith("seed=")]
    if args.which == "single":
        table("ggeur_digits", SINGLE, SPLITS, seeds, rest)
    elif args.which in MULTI:
        table(MULTI[args.which], DOMAINS, SKEWS, seeds, rest)
    else:
        skew = dict(itertools.islice(reversed(SKEWS.items()), 1))
        table("ggeur_domains", bases(), skew, seeds, ["name=ggeur_bases", "model=mlp", *rest])
    return 0


if __name__ == "__main__":
    sys.exit(main())
