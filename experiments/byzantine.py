"""Which aggregation survives hostile clients: rules x attacks, 3 hostile clients of 15, three seeds.

    python -m experiments.byzantine everything                                     all rules and what can come before
    python -m experiments.byzantine digits                                         rules x attacks, one gradient a round
    python -m experiments.byzantine fashion --data ../shared/data/fashion_mnist    rules x attacks, local training
    python -m experiments.byzantine lam                                            the flag aggregator's pair weight
    python -m experiments.byzantine scaling                                        (15, 3), (30, 6), (60, 12) clients

``everything`` is ``digits`` with every rule, pre-aggregators before four of them, and every attack; ``--rules`` and
``--attacks`` choose among them; a backdoor's success rates are a column of their own, of which less is better.
``digits`` is the flag aggregator's way to train (gradients of one step, server SGD with momentum) on IID data;
``fashion`` is federated averaging with label skew (Dirichlet 0.3, five local steps) on 6000 images of Fashion-MNIST.
Each ends in a table of accuracies in percent (mean ± sample deviation over seeds, and the worst over attacks),
``table.csv`` and ``heatmap.png`` under ``--out``. Finished runs are skipped, so it can be stopped and started again.
``--seeds 0`` takes one seed only; ``--picture FILE`` copies the picture.
"""

from __future__ import annotations

import argparse
import csv
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.api import run
from fedsim.config.compose import compose
from fedsim.report.heatmap import draw_heat_map

RULES: Mapping[str, tuple[str, ...]] = {
    "mean": ("aggregator=mean",),
    "coordinate median": ("aggregator=coordinate_median",),
    "trimmed mean": ("aggregator=trimmed_mean", "aggregator.f={f}"),
    "MeaMed": ("aggregator=meamed", "aggregator.f={f}"),
    "Phocas": ("aggregator=phocas", "aggregator.f={f}"),
    "Krum": ("aggregator=krum", "aggregator.f={f}"),
    "Multi-Krum": ("aggregator=multi_krum", "aggregator.f={f}"),
    "Bulyan": ("aggregator=bulyan", "aggregator.f={f}"),
    "geometric median": ("aggregator=geometric_median",),
    "norm clip": ("aggregator=norm_clip",),
    "flag, raw": ("aggregator=flag", "aggregator.scale=raw"),
    "flag, unit": ("aggregator=flag", "aggregator.scale=unit"),
    "flag, median norm": ("aggregator=flag", "aggregator.scale=median_norm"),
}
MORE_RULES: Mapping[str, tuple[str, ...]] = {
    "centered clipping": ("aggregator=centered_clipping", "aggregator.tau=1.0", "aggregator.L=3"),
    "MDA": ("aggregator=mda", "aggregator.f={f}"),
    "SMEA": ("aggregator=smea", "aggregator.f={f}"),
    "CAF": ("aggregator=caf", "aggregator.f={f}"),
    "MoNNA": ("aggregator=monna", "aggregator.f={f}"),
    **{
        f"{before} + {name}": (*rule, f"aggregator.before=[{stage}]")
        for before, stage in {
            "NNM": "{{nnm:{{f:{f}}}}}",
            "bucketing": "{{bucketing:{{s:2}}}}",
            "ARC": "{{arc:{{f:{f}}}}}",
            "ARC + NNM": "{{arc:{{f:{f}}}}},{{nnm:{{f:{f}}}}}",
        }.items()
        for name, rule in {
            "mean": ("aggregator=mean",),
            "median": ("aggregator=coordinate_median",),
            "trimmed mean": ("aggregator=trimmed_mean", "aggregator.f={f}"),
            "geometric median": ("aggregator=geometric_median",),
        }.items()
    },
}
ATTACKS: Mapping[str, tuple[str, ...]] = {
    "none": ("attack=none",),
    "random": ("attack=random_uniform",),
    "reverse x10": ("attack=reverse",),
    "ALIE z=1.5": ("attack=alie", "attack.z=1.5"),
    "IPM 2": ("attack=ipm", "attack.epsilon=2.0"),
    "label flip": ("attack=label_flip",),
    "mimic": ("attack=mimic",),
    "drop 10 %": ("attack=drop",),
}
MORE_ATTACKS: Mapping[str, tuple[str, ...]] = {
    "sign flip": ("attack=sign_flip",),
    "Gaussian": ("attack=random_gaussian",),
    "ALIE, optimal": ("attack=alie_optimal",),
    "IPM, optimal": ("attack=ipm_optimal",),
    "backdoor": ("attack=backdoor",),
}
SUCCESS = "backdoor, success"  # a column of its own: the lower the better
WORST = "worst"  # over the attacks, of accuracies
GRADIENTS = (
    "strategy=fedsgd",
    "strategy.server_lr={lr}",
    "client.steps=1",
    "client.batch_size=32",
    "client.weight_decay=0",
    "client.clip_norm=null",
    "partition=iid",
    "rounds=40",
)
LOCAL = (
    "strategy=fedavg",
    "strategy.weighting=uniform",
    "strategy.server_lr={lr}",
    "client=fedspeed_paper",
    "client.steps=5",
    "client.batch_size=32",
    "partition=dirichlet",
    "partition.alpha=0.3",
    "rounds=40",
)
COMMON = (
    "engine=serial",
    "tracker=quiet",
    "evaluation.every=100000",
    "checkpoint.every=0",
    "client.lr_decay=1",
)
LAMBDAS = (0, 1, 2, 4, 8, 16, 32, 64)
Results = dict[tuple[str, str], list[float]]


def accuracy(overrides: Sequence[str], values: Mapping[str, object]) -> float:
    """Test accuracy in percent at the end of one run."""
    return 100 * float(summary(overrides, values)["accuracy"])


def summary(overrides: Sequence[str], values: Mapping[str, object]) -> Mapping[str, Any]:
    """What one run ends with; a finished one is not run again."""
    common: Sequence[str] = values["common"]  # type: ignore[assignment]
    hostile = () if "attack=none" in overrides else (f"attack.fraction={values['share']}",)
    config = compose([o.format(**values) for o in (*COMMON, *common, *overrides, *hostile)])
    return run(config).summary


def train(kind: str, rule: str) -> tuple[str, ...]:
    """Settings of the training, with the server's learning rate that suits the size of the rule's output."""
    unit = rule == "flag, unit"
    lr = (0.05 if unit else 0.1) if kind == "gradients" else (0.1 if unit else 1.0)
    return tuple(o.replace("{lr}", str(lr)) for o in (GRADIENTS if kind == "gradients" else LOCAL))


def grid(args: argparse.Namespace) -> Results:
    """All rules under all attacks."""
    fashion, rules, attacks = args.what == "fashion", dict(RULES), dict(ATTACKS)
    if args.what == "everything":
        rules, attacks = rules | MORE_RULES, attacks | MORE_ATTACKS
    rules = {k: v for k, v in rules.items() if not args.rules or k in args.rules}
    attacks = {k: v for k, v in attacks.items() if not args.attacks or k in args.attacks}
    data = ("data=fashion_mnist", "data.subset=6000", "model.hidden=[64]") if fashion else ("data=digits",)
    data += (f"data.path={args.data}",) if args.data else ()
    out: Results = {}
    for seed in args.seeds:
        for attack, hostile in attacks.items():
            for rule, options in rules.items():
                settings = (*train("local" if fashion else "gradients", rule), *data, *options, *hostile)
                settings = tuple(f"rounds={args.rounds}" if o.startswith("rounds=") else o for o in settings)
                row = summary(settings, cohort(args, 15, seed))
                out.setdefault((rule, attack), []).append(100 * float(row["accuracy"]))
                if "attack_success" in row:
                    out.setdefault((rule, SUCCESS), []).append(100 * float(row["attack_success"]))
        done = args.seeds[: args.seeds.index(seed) + 1]
        what = f"{args.what}, 3 of 15 hostile, {args.rounds} rounds, seeds {done}"
        report(args, out, f"Accuracy %, {what}")
    return out


def lambdas(args: argparse.Namespace) -> Results:
    """The weight of the pair terms in both forms, 7 clients of which 1 sends noise, and none."""
    out: Results = {}
    for pairs in ("code", "paper"):
        for lam in LAMBDAS:
            flag = ("aggregator=flag", f"aggregator.lam={lam}", f"aggregator.pairs={pairs}")
            for attack in ("none", "random", "reverse x10"):
                settings = (*train("gradients", "flag"), "data=digits", *flag, *ATTACKS[attack])
                found = [accuracy(settings, cohort(args, 7, s, share=0.15)) for s in args.seeds]
                out[f"{pairs}, {lam}", attack] = found
    return out


def scaling(args: argparse.Namespace) -> Results:
    """A fifth of the clients reverse their gradient; the data stay the same in all."""
    out: Results = {}
    for rule in ("mean", "coordinate median", "Multi-Krum", "norm clip", "flag, unit", "flag, median norm"):
        for p in (15, 30, 60):
            for attack in ("none", "random", "reverse x10"):
                settings = (*train("gradients", rule), "data=digits", *RULES[rule], *ATTACKS[attack])
                found = [accuracy(settings, cohort(args, p, s)) for s in args.seeds]
                out[rule, f"{attack}, ({p}, {p // 5})"] = found
    return out


def cohort(args: argparse.Namespace, p: int, seed: int, share: float = 0.2) -> dict[str, object]:
    """What the settings' braces stand for, beside common settings."""
    common = (
        f"num_clients={p}",
        f"clients_per_round={p}",
        f"seed={seed}",
        f"out={args.out}",
        f"name={args.what}",
    )
    return {"f": p // 5, "share": share, "common": common}


def report(args: argparse.Namespace, results: Results, title: str) -> None:
    """Print a table with deviations, write ``table.csv`` and draw ``heatmap.png``, both with the worst over attacks."""
    rows, columns = list(dict.fromkeys(r for r, _ in results)), list(dict.fromkeys(c for _, c in results))
    folder = Path(args.out) / args.what
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rule", "attack", "mean", "deviation", "lowest", "highest", "seeds"])
        for (rule, attack), found in results.items():
            ends = [np.mean(found), deviation(found), min(found), max(found), len(found)]
            writer.writerow([rule, attack, *ends])
    print(f"\n{title}\n| rule | {' | '.join([*columns, WORST])} |\n|---|{'---|' * (len(columns) + 1)}")
    means = np.array([[np.mean(results.get((r, c), [np.nan])) for c in columns] for r in rows])
    attacked = [j for j, c in enumerate(columns) if not c.startswith("none") and c != SUCCESS]
    worst = (
        np.fmin.reduce(means[:, attacked], axis=1, keepdims=True)
        if attacked
        else np.full((len(rows), 1), np.nan)
    )
    for rule, least in zip(rows, worst[:, 0], strict=True):
        cells = [said(results.get((rule, c), [])) for c in columns]
        print(f"| {rule} | {' | '.join(cells)} | {said([least] if attacked else [])} |", flush=True)
    values = np.hstack([means, worst])
    less = [j for j, c in enumerate(columns) if c == SUCCESS]
    names, apart = [*columns, WORST], [*less, len(columns)]
    draw_heat_map(values, rows, names, folder / "heatmap.png", title=title, apart=apart, less=less)


def deviation(found: Sequence[float]) -> float:
    """Sample deviation over seeds; NaN of one."""
    return float(np.std(found, ddof=1)) if len(found) > 1 else float("nan")


def said(found: Sequence[float]) -> str:
    """``95.1 ± 0.4``."""
    spread = f" ± {deviation(found):.1f}" if len(found) > 1 else ""
    return f"{np.mean(found):.1f}{spread}" if found else "-"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("everything", "digits", "fashion", "lam", "scaling"))
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST; default: from the hub")
    parser.add_argument("--out", default="runs/byzantine")
    for what, names in (("rules", RULES | MORE_RULES), ("attacks", ATTACKS | MORE_ATTACKS)):
        text = f"names of {what}, as in the table; default: all"
        parser.add_argument(f"--{what}", nargs="+", choices=tuple(names), metavar="NAME", help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="a copy of heatmap.png")
    args = parser.parse_args()
    logging.getLogger("fedsim").setLevel(
        logging.ERROR
    )  # diverged runs leave everybody out, round after round
    if args.what in ("everything", "digits", "fashion"):
        grid(args)
    else:
        results = lambdas(args) if args.what == "lam" else scaling(args)
        report(args, results, f"Accuracy %, {args.what}, seeds {args.seeds}")
    if args.picture:
        shutil.copyfile(Path(args.out) / args.what / "heatmap.png", args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
