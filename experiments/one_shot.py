"""One-shot methods from the same models: five seeds, paired, of Co-Boosting, its parts and its field.

    python -m experiments.one_shot digits                       minutes on a CPU
    python -m experiments.one_shot mixed                        the same of clients with four architectures
    python -m experiments.one_shot fashion data.path=<folder>   better a GPU
    python -m experiments.one_shot cifar10 data.path=<folder>   Co-Boosting's Table 1; needs a GPU

Prints two tables and writes a report. Clients are trained once a seed, whatever the method; it can be stopped and
started again. Further arguments are overrides for every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from fedsim.cli.main import command
from fedsim.config.words import last_of_each
from fedsim.report.runs import Run, load_runs

SEEDS = "0,1,2,3,4"
PROXY = "strategy.proxy=0.1"
SMALL = (  # the generator and student of the small form on digits
    *("strategy.generator=mlp", "strategy.noise=32", "strategy.width=128", "strategy.init_std=[0.1,0.15]"),
    *("strategy.generator_lr=0.01", "strategy.generator_steps=20", "strategy.samples=64"),
    *("strategy.batch_size=64", "strategy.lr=0.05"),
)
PLAIN = ("strategy.h=0", "strategy.perturb=none")
BOOSTING = {
    "nothing extra": ("strategy=co_boosting", *PLAIN, "strategy.weights=false"),
    "weights only": ("strategy=co_boosting", *PLAIN),
    "co-boosting": ("strategy=co_boosting",),
    "dense": ("strategy=dense",),
}
OTHERS = {
    "one-shot": ("strategy=one_shot", "rounds=1"),
    "feddf": ("strategy=feddf", PROXY),
    "feddf, probabilities": ("strategy=feddf", "strategy.average=probabilities"),
    "feddf, noise": ("strategy=feddf", "strategy.data=noise"),
    "fens": ("strategy=fens", "rounds=400", "evaluation.every=100"),
    "fens, mlp": ("strategy=fens", "strategy.kind=mlp", "rounds=400", "evaluation.every=100"),
    "analytic, pixels": ("strategy=analytic", "model=linear", "~model.hidden", "rounds=1"),
    "analytic, random ReLU": (
        *("strategy=analytic", "model=linear", "~model.hidden", "rounds=1"),
        *("encoder=random_features", "encoder.width=512"),
    ),
}
NUMBERS = ("fedavg", "best_client", "uniform", "probabilities", "ensemble")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=("digits", "mixed", "fashion", "cifar10"))
    parser.add_argument("--seeds", default=SEEDS, help="default: %(default)s")
    parser.add_argument("--methods", default="", help="some, separated by ;")
    args, overrides = parser.parse_known_args()
    experiment = f"one_shot_{args.setting}"
    chosen = [m for m in args.methods.split(";") if m]
    codes = [
        command(
            last_of_each(
                [
                    "-m",
                    f"experiment={experiment}",
                    f"method={_slug(name)}",
                    *words,
                    f"seed={args.seeds}",
                    *overrides,
                ]
            )
        )
        for name, words in methods(args.setting).items()
        if not chosen or name in chosen
    ]
    folder = Path(next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs")) / experiment
    runs = load_runs([folder])
    print(table(runs))
    print(paired(runs))
    return max(*codes, 0, command(["report", str(folder)]))


def methods(setting: str) -> dict[str, tuple[str, ...]]:
    """Overrides of each method; all leave the same proxy part of each client's samples out."""
    small = SMALL if setting in ("digits", "mixed") else ()
    boosting = {k: (*v, *small) for k, v in BOOSTING.items()}
    others = {k: v for k, v in OTHERS.items() if setting == "digits" or not k.startswith("analytic, pixels")}
    if setting == "mixed":  # sums over the features of one model
        others = {k: v for k, v in others.items() if not k.startswith("analytic")}
    if setting == "cifar10":  # no samples at the server
        others = {k: v for k, v in others.items() if k not in ("feddf", "feddf, probabilities")}
    whole = boosting | others
    if setting not in ("digits", "mixed"):  # their networks have no such key
        whole = {k: tuple(word for word in v if word != "~model.hidden") for k, v in whole.items()}
    return {k: v if "analytic" in k or PROXY in v else (*v, PROXY) for k, v in whole.items()}


def table(runs: list[Run]) -> str:
    """Markdown: accuracy in % after the last round, mean and deviation over seeds; and of the models that each began
    from."""
    lines = [f"| method | seeds | accuracy | {' | '.join(NUMBERS)} |", "|---" * (len(NUMBERS) + 3) + "|"]
    for method, group in sorted(_by_method(runs).items()):
        columns = ["accuracy", *(f"{name}/accuracy" for name in NUMBERS)]
        cells = [_spread([v for run in group.values() if (v := _last(run, c)) is not None]) for c in columns]
        lines.append(f"| {method} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paired(runs: list[Run]) -> str:
    """Markdown: differences of the student's accuracy seed by seed, in points."""
    groups = _by_method(runs)
    wanted = (
        ("weights-only", "nothing-extra", "accuracy"),
        ("co-boosting", "nothing-extra", "accuracy"),
        ("weights-only", "weights-only", "fedavg/accuracy"),
        ("feddf", "feddf", "uniform/accuracy"),
        ("fens", "fens", "uniform/accuracy"),
        ("one-shot", "one-shot", "uniform/accuracy"),
    )
    lines = ["", "| difference | seeds | points |", "|---|---|---|"]
    for one, other, column in wanted:
        first = "probabilities/accuracy" if one == "one-shot" else "accuracy"
        seeds = sorted(groups.get(one, {}).keys() & groups.get(other, {}).keys())
        pairs = [(_last(groups[one][s], first), _last(groups[other][s], column)) for s in seeds]
        found = [a - b for a, b in pairs if a is not None and b is not None]
        lines.append(f"| {one} {first} - {other} {column} | {len(found)} | {_spread(found)} |")
    return "\n".join(lines)


def _by_method(runs: list[Run]) -> dict[str, dict[int, Run]]:
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.status == "done":
            found.setdefault(run.method, {})[int(run.config["seed"])] = run
    return found


def _last(run: Run, column: str) -> float | None:
    values = list(run.series(column).values())
    return 100 * values[-1] if values else None


def _spread(numbers: list[float]) -> str:
    if not numbers:
        return ""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.1f} ± {deviation:.1f}"


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-").lower()


if __name__ == "__main__":
    sys.exit(main())
