"""FedSTO on shapes in weathers, offline: do pictures without labels help a detector that was trained on cloudy ones?

    python -m experiments.ssl_fedsto

Five paired seeds (``experiment=fedsto_weather``), some ten minutes each on a CPU core: a detector is trained on the
server's labelled pictures, and from there on by the server alone, by pseudo labels of moving averages, by FedSTO, and,
the ceiling, by the true boxes of the clients' pictures.
Finished runs are skipped; further arguments are overrides for every run, e.g. ``rounds=12``, and ``seed=0,1`` other
seeds. Prints mAP at IoU .5 after the last round, by weather, means and sample standard deviations over seeds in
percent, and each method's difference to the server alone, seed by seed. ``fedsim report runs/fedsto_weather`` draws
what the models find.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence

import fedsim
from fedsim.api import RunResult

METRIC = "boxes/map_50"
WEATHERS = ("cloudy", "overcast", "rainy", "snowy")
COLUMNS = (*(f"domain/{name}/{METRIC}" for name in WEATHERS), f"domains/{METRIC}")
EXPERIMENT = "experiment=fedsto_weather"
WARM = (  # 50 passes
    "method=warm-up",
    "strategy=server_only",
    "strategy.server_epochs=1",
    "strategy.warmup_rounds=49",
    "strategy.warmup_lr=[0.03,0.015,0.005]",
    "client.lr=0.005",
    "rounds=1",
)
PSEUDO = (
    "strategy.alpha=0.99",
    "strategy.weights={class: 0.3, objectness: 0.7, box: 2.0}",
    "strategy.strong=[strong,cutout]",
)
ON = ("strategy.warmup_rounds=0",)
METHODS: Mapping[str, Sequence[str]] = {
    "server only": ("strategy=server_only", "strategy.server_epochs=1", *ON),
    "pseudo labels + EMA": ("strategy=pseudo_ema", *PSEUDO, *ON),
    "FedSTO": ("strategy=fedsto", "strategy.selective_rounds=8", *PSEUDO, *ON),
    "true boxes (ceiling)": (
        "strategy=pseudo_ema",
        "method=ceiling",
        "data.labelled.withhold=false",
        *PSEUDO,
        *ON,
    ),
}


def compared(overrides: Sequence[str], seeds: Sequence[int]) -> dict[str, list[RunResult]]:
    """All methods on all seeds, from the same warm model."""
    found: dict[str, list[RunResult]] = {"after warm-up": []}
    warm = [o for o in overrides if not o.startswith(("rounds=", "strategy."))]
    for seed in seeds:
        start = fedsim.simulate([EXPERIMENT, *WARM, f"seed={seed}", *warm])
        found["after warm-up"].append(start)
        for name, options in METHODS.items():
            mine = [o for o in overrides if name == "FedSTO" or not o.startswith("strategy.")]
            settings = [EXPERIMENT, *options, f"seed={seed}", *mine]
            found.setdefault(name, []).append(fedsim.simulate(settings, initial=start.weights))
    return found


def table(found: Mapping[str, Sequence[RunResult]]) -> str:
    """Markdown."""
    head = (*WEATHERS, "mean", "mean, to server only")
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    base = [_last(r, COLUMNS[-1]) for r in found["server only"]]
    for name, runs in found.items():
        cells = [_cell([_last(r, column) for r in runs]) for column in COLUMNS]
        gain = _cell([_last(r, COLUMNS[-1]) - b for r, b in zip(runs, base, strict=True)])
        lines.append(f"| {name} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def _last(run: RunResult, column: str) -> float:
    return float(next(row[column] for row in reversed(run.rows) if column in row))


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def main(arguments: Sequence[str]) -> None:
    """Run what is missing, print the table, draw the picture."""
    seeds = [a for a in arguments if a.startswith("seed=")]
    chosen = [int(s) for s in seeds[-1].removeprefix("seed=").split(",")] if seeds else range(5)
    found = compared([a for a in arguments if a not in seeds], chosen)
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
