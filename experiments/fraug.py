"""FRAug, its controls and its baselines: personal models on the test set of each client's own domain.

    python -m experiments.fraug small --data ../shared/data/digits6          minutes on a CPU
    python -m experiments.fraug digits --data <folder of Digits-5>           the paper's settings; these need a GPU
    python -m experiments.fraug pacs model.weights=<resnet18-*.pth>
    python -m experiments.fraug officehome model.weights=<resnet18-*.pth>

Each makes three seeds of every method, prints a table and writes a report; it can be stopped and started again.
Controls: without generator (noise in its place), without RTNet (the generator's embeddings as they are).
Further arguments are overrides for every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from fedsim.cli.main import command
from fedsim.config.words import last_of_each
from fedsim.report.runs import Run, load_runs

BASELINES = ("fedbn", "silobn", "fedavg", "fedprox", "moon", "local_only")
ACCURACY = "clients/domains/accuracy"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=("small", "digits", "pacs", "officehome"))
    parser.add_argument(
        "--data", type=Path, help="folder of the data; default: from the hub where it has them"
    )
    args, overrides = parser.parse_known_args()
    if args.data:
        overrides.append(f"data.path={args.data}")
    experiment, fraug = f"fraug_{args.setting}", FRAUG[args.setting]
    sweeps = [
        [f"strategy={fraug}", "method=fraug"],
        [f"strategy={fraug}", "strategy.use_generator=false", "method=fraug-no-generator"],
        [f"strategy={fraug}", "strategy.use_rtnet=false", "method=fraug-no-rtnet"],
        [f"strategy={','.join(BASELINES)}"],
    ]
    codes = [
        command(last_of_each(["-m", f"experiment={experiment}", *s, "seed=0,1,2", *overrides]))
        for s in sweeps
    ]
    folder = Path(next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs")) / experiment
    print(table(load_runs([folder])))
    return max(*codes, command(["report", str(folder)]))


FRAUG = {"small": "fraug_digits", "digits": "fraug_digits", "pacs": "fraug", "officehome": "fraug_officehome"}


def table(runs: list[Run]) -> str:
    """Markdown: accuracy in %, last and best, mean over domains and deviation over seeds; the last of each domain."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "done":
            methods.setdefault(run.method, []).append(run)
    names = sorted(
        {
            k
            for run in runs
            for k in run.rows[-1]
            if k.startswith("clients/domain/") and k.endswith("/accuracy")
        }
    )
    head = ["method", "last", "best", *(n.split("/")[2] for n in names), "MB up and down"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, group in sorted(
        methods.items(), key=lambda m: -statistics.mean(_last(r, ACCURACY) for r in m[1])
    ):
        ends = [_last(run, ACCURACY) for run in group]
        bests = [100 * max(run.series(ACCURACY).values()) for run in group]
        each = [f"{statistics.mean(_last(run, n) for run in group):.1f}" for n in names]
        moved = statistics.mean(run.total("bytes_up") + run.total("bytes_down") for run in group) / 1e6
        lines.append(f"| {' | '.join([method, _spread(ends), _spread(bests), *each, f'{moved:.0f}'])} |")
    return "\n".join(lines)


def _last(run: Run, metric: str) -> float:
    return 100 * list(run.series(metric).values())[-1]


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
