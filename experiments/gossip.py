"""Vanishing variance in gossip learning: plain against variance-corrected averaging on scikit-learn's digits.

    python -m experiments.gossip            all that needs no data set but digits
    python -m experiments.gossip bar        plain, corrected and shared start on a random 8-regular graph, five seeds
    python -m experiments.gossip graphs     the three of them on other graphs and in other settings
    python -m experiments.gossip baselines  the correction's options, D-PSGD, local and federated learning
    python -m experiments.gossip async      the authors' ticks: 50 peers, batches of 64 from the whole training set
    python -m experiments.gossip images --data FOLDER    LeNet on Fashion-MNIST, 50 peers, the three of the bar

32 peers with 44 or 45 digits each, MLP 64-64-64-10 with Xavier weights, one batch of 16 a round, lr 0.05, momentum 0.9.
Runs end at 90 % (async and images: 80 %) mean accuracy of the peers' own models. Finished runs are skipped, so it can
be stopped and started again; ``--only REGEX`` keeps the lines in whose "setting, method" it is found. Prints Markdown
tables and draws docs/gossip_digits.png and docs/gossip_images.png. Further arguments are overrides for every run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.api import run
from fedsim.config.compose import compose

LEVELS = (0.5, 0.8, 0.9)
PARTS = ("bar", "graphs", "baselines", "async", "images")
BAR_SEEDS = 5
LAYERS = {"bar": "layers.0.weight", "images": "conv1.weight"}  # parts with a picture, the tensor it follows
PICTURES = Path(__file__).resolve().parents[1] / "docs"
PLAIN = ("strategy=gossip_fedavg",)
CORRECTED = ("strategy=gossip",)
SHARED = ("strategy=gossip_fedavg", "strategy.init_models=shared")
THREE = {"plain": PLAIN, "corrected": CORRECTED, "shared start, plain": SHARED}
BASELINES: Mapping[str, Sequence[str]] = {
    "gossip FedAvg (plain)": PLAIN,
    "corrected": CORRECTED,
    "corrected, target row": ("strategy=gossip", "strategy.target=row"),
    "corrected, all tensors": ("strategy=gossip", "strategy.scope=all"),
    "corrected, eps 1e-4": ("strategy=gossip", "strategy.eps=1e-4"),
    "D-PSGD": ("strategy=dpsgd", "strategy.momentum=keep"),
    "D-PSGD, independent start": (
        "strategy=dpsgd",
        "strategy.momentum=keep",
        "strategy.init_models=independent",
    ),
    "local only": (*PLAIN, "topology=erdos_renyi", "topology.p=0", "topology.connected=allow", "rounds=300"),
    "federated, server momentum": ("strategy=fedavgm", "topology=server", "client.momentum=0"),
}
SETTINGS: Mapping[str, Sequence[str]] = {
    "ring": ("topology=ring",),
    "torus 4x8": ("topology=torus",),
    "Barabasi-Albert, m = 4": ("topology=barabasi_albert",),
    "Erdos-Renyi, p = 8/31": ("topology=erdos_renyi", "topology.p=0.25806"),
    "Watts-Strogatz, k = 8, p = 0.1": ("topology=watts_strogatz",),
    "complete": ("topology=complete",),
    "star": ("topology=star",),
    "8-regular, uniform mixing": ("strategy.mixing=uniform",),
    "Barabasi-Albert, Metropolis-Hastings": ("topology=barabasi_albert", "strategy.mixing=metropolis"),
    "8-regular, labels Dirichlet(0.3)": ("partition=dirichlet", "partition.alpha=0.3"),
    "8-regular, 5 steps a round": ("client.steps=5",),
    "8-regular, one more layer": ("model.model.hidden=[64,64,64]",),
    "ring, one more layer": ("topology=ring", "model.model.hidden=[64,64,64]"),
    "8-regular, 64 peers": ("num_clients=64", "clients_per_round=64"),
    "8-regular, no momentum, lr 0.1": ("client.momentum=0", "client.lr=0.1"),
}
ASYNC: Mapping[str, Sequence[str]] = {
    "corrected": (),
    "plain": ("strategy.averaging=plain",),
}


@dataclass(frozen=True)
class Line:
    """One line of the table: a setting, a method, and what its runs over seeds measured."""

    setting: str
    method: str
    rows: Sequence[Sequence[Mapping[str, Any]]]

    def reached(self, level: float) -> list[float]:
        """First round whose accuracy is at least ``level``, per seed; NaN where it is not reached."""
        return [
            next((float(r["round"]) for r in rows if (r.get("accuracy") or 0) >= level), float("nan"))
            for rows in self.rows
        ]

    def text(self) -> str:
        cells = [_span(self.reached(level)) for level in LEVELS]
        return f"| {self.setting} | {self.method} | {len(self.rows)} | {' | '.join(cells)} |"


def _span(values: Sequence[float]) -> str:
    if any(np.isnan(values)):
        return "-" if all(np.isnan(values)) else f"- ({sum(~np.isnan(values))} of {len(values)})"
    low, high = min(values), max(values)
    return f"{np.mean(values):.1f} ({low:.0f}-{high:.0f})" if low != high else f"{low:.0f}"


def measure(setting: str, method: str, overrides: Sequence[str], seeds: int, more: Sequence[str]) -> Line:
    """Run, or read, one line of the table."""
    rows = []
    for seed in range(seeds):
        settings = ["engine=serial", "tracker=quiet", f"seed={seed}", *overrides, *more]
        rows.append(run(compose(settings)).rows)
    line = Line(setting, method, rows)
    print(line.text(), flush=True)
    return line


def table(lines: Sequence[Line]) -> str:
    """All lines as Markdown."""
    head = "| graph | method | seeds | " + " | ".join(f"rounds to {level:.0%}" for level in LEVELS) + " |"
    return "\n".join([head, "|---|---|---|" + "---|" * len(LEVELS), *(line.text() for line in lines)])


def verdict(lines: Sequence[Line]) -> str:
    """The two ratios that the method is judged by."""
    plain, corrected, shared = (np.mean(line.reached(0.8)) for line in lines[:3])
    return (
        f"rounds to 80 %: plain / corrected {plain / corrected:.2f} (bar: at least 4), "
        f"corrected / shared start {corrected / shared:.2f} (bar: at most 1.3)"
    )


def picture(lines: Sequence[Line], path: Path, layer: str) -> None:
    """Accuracy and the variance of ``layer`` against rounds, mean and range over seeds."""
    from matplotlib.figure import Figure

    from fedsim.report.curves import COLOURS

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for line, colour in zip(lines, COLOURS, strict=False):
        for ax, key in zip(axes, ("accuracy", f"variance/{layer}"), strict=True):
            length = min(len(rows) for rows in line.rows)
            measured = [[r for r in rows[:length] if key in r] for rows in line.rows]
            values = np.array([[float(r[key]) for r in rows] for rows in measured])
            x = [r["round"] for r in measured[0]]
            ax.plot(x, values.mean(axis=0), color=colour, label=line.method)
            ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axes[0].set(xlabel="round", ylabel="mean accuracy of peers")
    axes[1].set(xlabel="round", ylabel="first-layer variance / start", yscale="log")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def lines_of(args: argparse.Namespace, more: Sequence[str]) -> Iterator[tuple[str, str, list[Line]]]:
    """What is asked for, part by part: its name, a note, and its lines, each run or read."""
    digits = ("experiment=gossip_digits", "evaluation.target=0.9")
    seldom, ticks = (*digits, "evaluation.every=2"), ("experiment=gossip_async",)
    images = ("experiment=gossip_images", f"data.path={args.data}")
    parts: Mapping[str, tuple[str, int, list[tuple[str, str, Sequence[str]]]]] = {
        "bar": ("", BAR_SEEDS, [("random 8-regular", m, (*digits, *o)) for m, o in THREE.items()]),
        "async": (
            "(a round is 50 ticks)",
            args.seeds,
            [("async, 8-regular", m, (*ticks, *o)) for m, o in ASYNC.items()],
        ),
        "graphs": (
            "",
            args.seeds,
            [(s, m, (*seldom, *o, *c)) for s, c in SETTINGS.items() for m, o in THREE.items()],
        ),
        "baselines": ("", args.seeds, [("8-regular", m, (*seldom, *o)) for m, o in BASELINES.items()]),
        "images": ("", args.seeds, [("Fashion-MNIST, LeNet", m, (*images, *o)) for m, o in THREE.items()]),
    }
    wanted = [p for p in parts if p != "images" or args.data] if args.part == "all" else [args.part]
    for part in wanted:
        note, seeds, lines = parts[part]
        chosen = [line for line in lines if re.search(args.only, f"{line[0]}, {line[1]}")]
        yield part, note, [measure(s, m, o, seeds, more) for s, m, o in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS))
    parser.add_argument("--seeds", type=int, default=2, help="of all lines but the bar's, which has five")
    parser.add_argument("--only", default="", help="regular expression on 'setting, method' of lines to run")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's files, for images")
    parser.add_argument("--docs", type=Path, default=PICTURES, help="folder of the pictures")
    args, more = parser.parse_known_args()
    if args.part == "images" and args.data is None:
        parser.error("images: give --data, the folder with Fashion-MNIST's files")
    for part, note, lines in lines_of(args, more):
        print(f"\n{table(lines)}\n{note}", flush=True)
        if part in LAYERS and not args.only:
            picture(lines, args.docs / f"gossip_{'digits' if part == 'bar' else part}.png", LAYERS[part])
            print(verdict(lines), flush=True)


if __name__ == "__main__":
    main()
