"""FedoSSL on digits, offline: which part of the objective finds the classes that nobody labelled?

    python -m experiments.ssl_fedossl

Five paired seeds of every objective, minutes on one core (``experiment=fedossl_digits``). Finished runs are skipped;
further arguments are overrides for every run, e.g. ``rounds=2`` or ``out=elsewhere``, and ``seed=0,1`` other seeds.
Prints the last round of the global model, means and sample standard deviations over seeds in percent, and each
objective's difference to the first in ``all``, seed by seed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence

from fedsim.api import RunResult, run
from fedsim.config.compose import compose

COLUMNS = ("all", "seen", "AU", "LU", "GU", "NMI", "pseudo/accuracy")
COMMON = ("experiment=fedossl_digits", "strategy.centroids=16", "strategy.cal_start=3", "strategy.gamma=0.5")
BARE = ("strategy.margin=false", "strategy.entropy=false")
ONLY_R, ONLY_CAL = ("strategy.gamma=0",), ("strategy.beta=0",)
OBJECTIVES: Mapping[str, Sequence[str]] = {
    "CE + pairwise": ("strategy=fedossl", *BARE, "strategy.beta=0", *ONLY_R),
    "+ entropy + margin (Fed-AO)": ("strategy=fedossl", "strategy.beta=0", *ONLY_R),
    "+ R only": ("strategy=fedossl", *ONLY_R),
    "+ calibration only": ("strategy=fedossl", *ONLY_CAL),
    "+ both, printed": ("strategy=fedossl",),
    "+ both, inverse": ("strategy=fedossl", "strategy.form=inverse"),
    "+ both, flat": ("strategy=fedossl", "strategy.form=flat"),
    "all labels (ceiling)": (
        "strategy=fedossl",
        "data.labelled.withhold=false",
        *BARE,
        "strategy.beta=0",
        *ONLY_R,
    ),
}


def fedossl(overrides: Sequence[str], seeds: Sequence[int]) -> dict[str, list[RunResult]]:
    """All objectives on all seeds."""
    return {
        name: [run(compose([*COMMON, *options, f"seed={seed}", *overrides])) for seed in seeds]
        for name, options in OBJECTIVES.items()
    }


def table(found: Mapping[str, Sequence[RunResult]]) -> str:
    """Markdown."""
    lines = [f"| objective | {' | '.join(COLUMNS)} | all, to the first |", "|---" * (len(COLUMNS) + 2) + "|"]
    first = next(iter(found.values()))
    for name, runs in found.items():
        cells = [_cell([float(r.summary[column]) for r in runs if column in r.summary]) for column in COLUMNS]
        pairs = zip(runs, first, strict=True)
        gain = _cell([float(a.summary["all"]) - float(b.summary["all"]) for a, b in pairs])
        lines.append(f"| {name} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def main(arguments: Sequence[str]) -> None:
    """Run what is missing and print the table."""
    seeds = [a for a in arguments if a.startswith("seed=")]
    chosen = [int(s) for s in seeds[-1].removeprefix("seed=").split(",")] if seeds else range(5)
    print(table(fedossl([a for a in arguments if a not in seeds], chosen)))


if __name__ == "__main__":
    main(sys.argv[1:])
