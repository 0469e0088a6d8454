"""FedLoGe and its baselines on long-tailed data: one global model (GM), and a personal one (PM) per client.

    python -m experiments.long_tail digits                                    about half an hour on one CPU core
    python -m experiments.long_tail cifar --data ../shared/data/cifar10       CIFAR-10 at 16x16, about two hours
    python -m experiments.long_tail paper --data ../shared/data/cifar10       the authors' setting; needs a GPU

``digits`` and ``cifar`` run every method with three seeds, ``paper`` imbalance 50 and 100 with one. All can be stopped
and started again; finished runs are skipped. A table and a picture are written beside the runs. Further arguments are
overrides for every run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsim.cli.main import command
from fedsim.config.words import last_of_each
from fedsim.tracking import read_rows

EXPERIMENTS = {"digits": "digits_lt", "cifar": "cifar10_lt_small", "paper": "cifar10_lt"}
HEAD = ["strategy=fedloge", "strategy.train=head"]
METHODS: Mapping[str, Sequence[str]] = {  # label of the run: what selects it
    "fedavg_heads": HEAD,
    "fedloge": ["strategy=fedloge"],
    "fedloge_norm1": ["strategy=fedloge", "strategy.sse.norm=1"],
    "fedavg_ft": ["strategy=fedavg_ft"],
    "ditto": ["strategy=ditto"],
    "fedper": ["strategy=fedper"],
    "fedrep": ["strategy=fedrep"],
    "fedrod": ["strategy=fedrod"],
    "fedetf": ["strategy=fedetf"],
    "logit_client": ["strategy=logit_adjust"],
    "logit_all": ["strategy=logit_adjust", "strategy.prior=all"],
}
# What is reported: name in the table, run, prefix of its global columns, prefix of its personal ones (None: has none).
ROWS: Sequence[tuple[str, str, str | None, str | None]] = (
    ("FedAvg", "fedavg_heads", "plain/", "phi_psi/"),
    ("FedAvg, realigned", "fedavg_heads", "", ""),
    ("FedAvg, private head", "fedavg_heads", None, "phi/"),
    ("FedAvg, fine-tuned", "fedavg_ft", "", ""),
    ("Ditto", "ditto", "", ""),
    ("FedPer", "fedper", None, ""),
    ("FedRep", "fedrep", None, ""),
    ("FedROD", "fedrod", "", ""),
    ("FedETF", "fedetf", "", ""),
    ("logit adjustment, own prior", "logit_client", "", ""),
    ("logit adjustment, joint prior", "logit_all", "", ""),
    *(
        (f"FedLoGe {norm}, {name}", run, gm, pm)
        for norm, run in (("0.1", "fedloge"), ("1", "fedloge_norm1"))
        for name, gm, pm in (
            ("realigned", "", ""),
            ("realigned, no bias", "no_bias/", None),
            ("psi / phi + psi", "plain/", "phi_psi/"),
            ("S / phi", "sse/", "phi/"),
        )
    ),
)
PARTS = ("accuracy", "many/accuracy", "medium/accuracy", "few/accuracy")
LAST = 3  # evaluations that are averaged


def measured(folder: Path, prefix: str | None, kind: str) -> list[float]:
    """Overall, many, medium and few accuracy of one run in percent, over its last evaluations; NaN if it has none."""
    if prefix is None:
        return [float("nan")] * len(PARTS)
    rows = [r for r in read_rows(folder / "metrics.jsonl") if f"{kind}{prefix}accuracy" in r][-LAST:]
    return [100 * float(np.mean([r.get(f"{kind}{prefix}{part}", np.nan) for r in rows])) for part in PARTS]


def table(folder: Path) -> pd.DataFrame:
    """A row per variant: mean over seeds of the global and the personal accuracies, and their sample deviation."""
    out = []
    for name, run, gm, pm in ROWS:
        folders = [f.parent for f in sorted(folder.glob(f"{run}-s*/summary.json"))]
        if not folders:
            continue
        row: dict[str, object] = {"method": name, "seeds": len(folders)}
        for kind, prefix, title in (("", gm, "GM"), ("clients/", pm, "PM")):
            values = np.array([measured(f, prefix, kind) for f in folders])
            row |= {f"{title} {part.split('/')[0]}": v for part, v in zip(PARTS, values.mean(0), strict=True)}
            row[f"{title} std"] = values[:, 0].std(ddof=1) if len(folders) > 1 else 0.0
        out.append(row)
    return pd.DataFrame(out)


def markdown(frame: pd.DataFrame) -> str:
    """The table for a README."""
    lines = [
        "| method | seeds | GM % | many / medium / few | PM % | many / medium / few |",
        "|---|---|---|---|---|---|",
    ]
    for row in frame.to_dict("records"):
        cells = [row["method"], row["seeds"]]
        for kind in ("GM", "PM"):
            known = not np.isnan(row[f"{kind} accuracy"])
            std = f" ± {row[f'{kind} std']:.1f}" if row["seeds"] > 1 else ""
            cells.append(f"{row[f'{kind} accuracy']:.1f}{std}" if known else "-")
            cells.append(
                " / ".join(f"{row[f'{kind} {p}']:.1f}" for p in ("many", "medium", "few")) if known else "-"
            )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Global against personal accuracy, and how the global one divides over the groups."""
    figure = Figure(figsize=(10, 0.9 + 0.26 * len(frame)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(frame))[::-1]
    for kind, marker, colour in (("GM", "o", "#4c72b0"), ("PM", "s", "#dd8452")):
        left.errorbar(
            frame[f"{kind} accuracy"], places, xerr=frame[f"{kind} std"], fmt=marker, color=colour, label=kind
        )
    for part, colour in (("many", "#55a868"), ("medium", "#8172b3"), ("few", "#c44e52")):
        right.plot(frame[f"GM {part}"], places, "o", color=colour, label=part)
    names = [f"{m} ({n})" for m, n in zip(frame["method"], frame["seeds"], strict=True)]
    left.set(
        yticks=places,
        yticklabels=names,
        xlabel="accuracy, %\nbar: sample deviation over seeds (their number)",
    )
    right.set(xlabel="GM accuracy by group of classes, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="lower left")
    right.legend(loc="upper left", fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=tuple(EXPERIMENTS))
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's parquet files")
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="METHOD")
    args, overrides = parser.parse_known_args()
    experiment = EXPERIMENTS[args.size]
    if args.data:
        overrides.append(f"data.path={args.data}")
    sweep = ["data.imbalance=50,100"] if args.size == "paper" else ["seed=0,1,2"]
    codes = [
        command(
            last_of_each(
                ["-m", f"experiment={experiment}", f"method={label}", *METHODS[label], *sweep, *overrides]
            )
        )
        for label in args.only
    ]
    if args.size != "paper":
        out = next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs")
        folder = Path(out) / experiment
        frame = table(folder)
        frame.to_csv(folder / "long_tail.csv", index=False)
        draw(frame, folder / "long_tail.png")
        print(markdown(frame))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
