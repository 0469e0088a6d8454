"""Methods for few labels and their references: labels only, the ceiling of true labels, and all labels.

    python -m experiments.ssl fedlabel          FedLabel on digits, five seeds; minutes on a CPU
    python -m experiments.ssl fedlabel-paper data.path=<folder>       CIFAR-10 as in the paper; needs a GPU
    python -m experiments.ssl semifl            60 labels at the server: SemiFL, FixMatch, the server alone
    python -m experiments.ssl fedossl           an open world of digits: experiments/ssl_fedossl.py
    python -m experiments.ssl fedsto            detection with labels at the server: experiments/ssl_fedsto.py

Each prints a table and writes a report; it can be stopped and started again. Further arguments are overrides for every
run; ``seed=0,1`` are other seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from experiments import ssl_fedossl, ssl_fedsto
from fedsim.cli.main import command
from fedsim.report.runs import Run, load_runs

LAST = 10  # evaluations that a run's number is the mean of
COLUMNS = ("accuracy", "pseudo/kept_share", "pseudo/global_share", "pseudo/accuracy")
ALL = ["strategy=fedavg", "method=all-labels", "data.labelled.at=null", "data.labelled.share=null"]
FEDLABEL = (
    ALL,
    ["strategy=fedavg", "method=labels-only"],
    ["strategy=fedlabel", "method=ceiling", "data.labelled.withhold=false"],
    ["strategy=fedlabel", "method=local-only", "strategy.teachers=local"],
    ["strategy=fedlabel", "method=global-only", "strategy.teachers=global"],
    ["strategy=fedlabel"],
    ["strategy=fedlabel", "method=fedlabel-lam0-0", "strategy.lam0=0"],
    ["strategy=fixmatch", "strategy.tau=0.8"],
    ["strategy=uda", "strategy.tau=0.8"],
    ["strategy=fedmatch"],
)
THREE = "strategy.server_epochs=3"
SEMIFL = (
    ["strategy=server_only", THREE],
    ["strategy=semifl", THREE],
    ["strategy=semifl", "method=semifl-parallel", "strategy.order=parallel", THREE],
    ["strategy=fixmatch", THREE],
    ["strategy=fixmatch", "method=ceiling", "data.labelled.withhold=false", THREE],
)
OTHERS = {"fedossl": ssl_fedossl.main, "fedsto": ssl_fedsto.main}
SETTINGS = {  # experiment, sweeps, seeds
    "fedlabel": ("fedlabel_digits", FEDLABEL, "0,1,2,3,4"),
    "semifl": ("semifl_digits", SEMIFL, "0,1,2,3,4"),
    "fedlabel-paper": ("fedlabel_cifar10", FEDLABEL, "0,1,2"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=(*SETTINGS, *OTHERS))
    args, overrides = parser.parse_known_args()
    if args.setting in OTHERS:
        OTHERS[args.setting](overrides)
        return 0
    experiment, sweeps, seeds = SETTINGS[args.setting]
    given = [o for o in overrides if o.startswith("seed=")]
    seeds = given[-1].removeprefix("seed=") if given else seeds
    overrides = [o for o in overrides if o not in given]
    codes = [command(["-m", f"experiment={experiment}", *s, f"seed={seeds}", *overrides]) for s in sweeps]
    folder = Path(next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs")) / experiment
    print(table(load_runs([folder])))
    return max(*codes, command(["report", str(folder)]))


def table(runs: list[Run]) -> str:
    """Markdown: accuracy and what became of pseudo labels, in %, mean and deviation over seeds."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "done":
            methods.setdefault(run.method, []).append(run)
    lines = [f"| {' | '.join(('method', 'seeds', *COLUMNS))} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method, group in sorted(methods.items(), key=lambda m: -_mean(m[1], "accuracy")[0]):
        found = [_spread(_mean(group, column)) for column in COLUMNS]
        lines.append(f"| {' | '.join((method, str(len(group)), *found))} |")
    return "\n".join(lines)


def _mean(runs: list[Run], column: str) -> tuple[float, float]:
    """Mean and sample deviation over runs, in %, of the last evaluations' means; NaN where a column is absent."""
    each = [list(run.series(column).values())[-LAST:] for run in runs]
    numbers = [100 * statistics.mean(values) for values in each if values]
    if not numbers:
        return float("nan"), float("nan")
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def _spread(pair: tuple[float, float]) -> str:
    return "" if pair[0] != pair[0] else f"{pair[0]:.1f} ± {pair[1]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
