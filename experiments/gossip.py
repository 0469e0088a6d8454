"""Vanishing variance in gossip learning: plain against variance-corrected averaging on scikit-learn's digits.

    python -m experiments.gossip            all of it; about 20 minutes on one calm core
    python -m experiments.gossip bar        plain, corrected and shared start on a random 8-regular graph, five seeds
    python -m experiments.gossip graphs     the three of them on other graphs and in other settings
    python -m experiments.gossip baselines  the correction's options, D-PSGD, local and federated learning
    python -m experiments.gossip async      the authors' ticks: 50 peers, batches of 64 from the whole training set

32 peers with 44 or 45 digits each, MLP 64-64-64-10 with Xavier weights, one batch of 16 a round, lr 0.05, momentum 0.9.
Runs end at 90 % (async: 80 %) mean accuracy of the peers' own models. Finished runs are skipped, so it can be stopped
and started again. Prints Markdown tables and draws docs/gossip_digits.png. Further arguments are overrides for every
run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.api import run
from fedsim.settings import compose

LEVELS = (0.5, 0.8, 0.9)
PICTURES = Path(__file__).resolve().parents[1] / "docs"
PLAIN = ("strategy=gossip_fedavg",)
CORRECTED = ("strategy=gossip",)
SHARED = ("strategy=gossip_fedavg", "strategy.init_models=shared")
THREE = {"plain": PLAIN, "corrected": CORRECTED, "shared start, plain": SHARED}
BASELINES: Mapping[str, Sequence[str]] = {
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
    "8-regular, Metropolis-Hastings": ("strategy.mixing=metropolis",),
    "8-regular, labels Dirichlet(0.3)": ("partition=dirichlet", "partition.alpha=0.3"),
    "8-regular, 5 steps a round": ("client.steps=5",),
    "8-regular, one more layer": ("model.model.hidden=[64,64,64]",),
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


def picture(lines: Sequence[Line], path: Path) -> None:
    """Accuracy and first-layer variance against rounds, mean and range over seeds."""
    from matplotlib.figure import Figure

    from fedsim.report.curves import COLOURS

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for line, colour in zip(lines, COLOURS, strict=False):
        for ax, key in zip(axes, ("accuracy", "variance/layers.0.weight"), strict=True):
            length = min(len(rows) for rows in line.rows)
            values = np.array([[float(r[key]) for r in rows[:length]] for rows in line.rows])
            x = np.arange(1, length + 1)
            ax.plot(x, values.mean(axis=0), color=colour, label=line.method)
            ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axes[0].set(xlabel="round", ylabel="mean accuracy of peers")
    axes[1].set(xlabel="round", ylabel="first-layer variance / start", yscale="log")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part", nargs="?", default="all", choices=("all", "bar", "graphs", "baselines", "async")
    )
    parser.add_argument("--seeds", type=int, default=2, help="of all lines but the bar's, which has five")
    parser.add_argument("--docs", type=Path, default=PICTURES, help="folder of the picture")
    args, more = parser.parse_known_args()
    digits = ("experiment=gossip_digits", "evaluation.target=0.9")
    seldom = (*digits, "evaluation.every=2")
    wanted = {"bar", "graphs", "baselines", "async"} if args.part == "all" else {args.part}
    if "bar" in wanted:
        lines = [measure("random 8-regular", m, (*digits, *o), 5, more) for m, o in THREE.items()]
        picture(lines, args.docs / "gossip_digits.png")
        print(f"\n{table(lines)}\n\n{verdict(lines)}\n", flush=True)
    if "async" in wanted:
        ticks = ("experiment=gossip_async",)
        lines = [measure("async, 8-regular", m, (*ticks, *o), args.seeds, more) for m, o in ASYNC.items()]
        print(f"\n{table(lines)}\n(a round is 50 ticks)\n", flush=True)
    if "graphs" in wanted:
        both = [(s, m, (*seldom, *o, *c)) for s, c in SETTINGS.items() for m, o in THREE.items()]
        print(f"\n{table([measure(s, m, o, args.seeds, more) for s, m, o in both])}\n", flush=True)
    if "baselines" in wanted:
        lines = [measure("8-regular", m, (*seldom, *o), args.seeds, more) for m, o in BASELINES.items()]
        print(f"\n{table(lines)}\n", flush=True)


if __name__ == "__main__":
    main()
