"""What leaves a client, and what that costs: accuracy against epsilon, bytes and simulated hours, on digits.

    python -m experiments.release                   all three parts, five seeds; about 20 minutes on one core
    python -m experiments.release --part privacy    epsilon, fixed and adaptive clipping, correlated and local noise
    python -m experiments.release --part records    DP-SGD inside each client
    python -m experiments.release --part link       codecs and masked sums over narrow links

Nothing is fetched. Seeds are paired: with one seed all methods of a part ask the same clients. Prints tables, says of
each bar of the specification whether it is met, draws ``release_privacy.png`` and ``release_link.png`` beside the runs.
It can be stopped and started again; finished runs are skipped. Further arguments are overrides for every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.release_bars import Accuracies, bars
from fedsim.cli.main import command
from fedsim.config.words import last_of_each
from fedsim.report.runs import Run, load_runs

CLIENT = ("privacy=client", "privacy.delta=1e-3")
IN_TURN = ("sampling=round_robin", "participation=fixed", "clients_per_round=95", "privacy.clip=0.5")
RECORD = (
    "num_clients=10", "clients_per_round=10", "participation=fixed", "rounds=30", "client.lr=1", "client.batch_size=14",
)  # fmt: skip
BUDGETS = ("0.5", "1", "2", "4", "8")
NO_FEEDBACK = "compression.feedback=false"
PRIVACY: Mapping[str, Sequence[str]] = {
    "clipped": (*CLIENT, "privacy.z=0"),
    **{f"eps{e}": (*CLIENT, f"privacy.epsilon={e}") for e in BUDGETS},
    **{f"adaptive{e}": (*CLIENT, f"privacy.epsilon={e}", "privacy.clip=adaptive") for e in ("2", "8")},
    "independent2": (*CLIENT, "privacy.epsilon=2", "privacy.accountant=pld", *IN_TURN),
    "banded2": (*CLIENT, "privacy.epsilon=2", "privacy.mechanism=banded", *IN_TURN),
    "local": ("privacy=local", "privacy.delta=1e-3", "privacy.z=2.147"),
    "eps8_qsgd": (*CLIENT, "privacy.epsilon=8", "compression=qsgd"),
    "eps8_top10": (*CLIENT, "privacy.epsilon=8", "compression=top_k", "compression.rate=0.1"),
    "eps8_masks": (*CLIENT, "privacy.epsilon=8", "secagg=masks"),
}
RECORDS: Mapping[str, Sequence[str]] = {
    "plain": RECORD,
    **{
        f"records{e}": (*RECORD, "privacy=record", "privacy.delta=1e-4", f"privacy.epsilon={e}") for e in "82"
    },
}
LINK: Mapping[str, Sequence[str]] = {
    "none": (),
    "top1": ("compression=top_k",),
    "top1_without": ("compression=top_k", NO_FEEDBACK),
    "top10": ("compression=top_k", "compression.rate=0.1"),
    "random10": ("compression=random_k",),
    "qsgd8": ("compression=qsgd", "compression.levels=127"),
    "qsgd4": ("compression=qsgd", "compression.levels=7"),
    "qsgd2": ("compression=qsgd", "compression.levels=1"),
    "qsgd4_down": ("compression=qsgd", "compression.levels=7", "compression.down={codec: qsgd, levels: 127}"),
    "sign": ("compression=sign",),
    "sign_without": ("compression=sign", NO_FEEDBACK),
    "rotate1": ("compression=rotate", "compression.bits=1"),
    "rotate4": ("compression=rotate", "compression.bits=4"),
    "low_rank": ("compression=low_rank", "compression.rank=2"),
    "masks": ("secagg=masks", "secagg.reach=1"),
}
PARTS = {
    "privacy": ("release_privacy", PRIVACY),
    "records": ("release_privacy", RECORDS),
    "link": ("release_link", LINK),
}
SHOWN = ("none", "top1", "sign", "qsgd4_down", "rotate1", "masks")  # in the picture of links


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, help="default: all")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="default: %(default)s")
    args, overrides = parser.parse_known_args()
    out = Path(next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs"))
    codes = []
    for part in [args.part] if args.part else PARTS:
        experiment, methods = PARTS[part]
        common = [f"experiment={experiment}", f"name=release_{part}", "tracker=quiet"]
        codes += [
            command(last_of_each(["-m", *common, f"method={name}", *given, f"seed={args.seeds}", *overrides]))
            for name, given in methods.items()
        ]
        codes.append(command(["report", str(out / f"release_{part}")]))
    show(out)
    return max(codes)


def show(out: Path) -> None:
    """Tables of what there is, bars, pictures."""
    runs = {
        part: [run for run in load_runs([out / f"release_{part}"]) if run.status == "done"]
        for part in PARTS
        if (out / f"release_{part}").is_dir()
    }
    found: Accuracies = {}
    for part, some in runs.items():
        last = by_method(some, PARTS[part][1])
        found |= last
        print(f"\n{table(part, some, last)}")
    print("\n" + "\n".join(bars(found)))
    if "privacy" in runs:
        draw_privacy(runs["privacy"], found, out / "release_privacy.png")
    if "link" in runs:
        draw_link(runs["link"], out / "release_link.png")


def by_method(runs: Sequence[Run], methods: Mapping[str, Sequence[str]]) -> Accuracies:
    """Accuracy after the last round, by method and seed."""
    found: Accuracies = {name: {} for name in methods}
    for run in runs:
        if run.method in found:
            found[run.method][run.seed] = run.series("accuracy")[int(run.rows[-1]["round"])]
    return {name: dict(sorted(values.items())) for name, values in found.items() if values}


def table(part: str, runs: Sequence[Run], last: Accuracies) -> str:
    """Markdown: accuracies, and what was spent or sent."""
    link = part == "link"
    head = ["method", "accuracy, each seed", "mean ± deviation"]
    head += (
        ["bytes up a client and round", "MB up", "MB down", "simulated h"]
        if link
        else ["epsilon", "z", "relation"]
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, values in last.items():
        group = [run for run in runs if run.method == name]
        each = " ".join(f"{v:.3f}".removeprefix("0") for v in values.values())
        spread = f" ± {statistics.stdev(values.values()):.3f}" if len(values) > 1 else ""
        cells = [name, each, f"{statistics.mean(values.values()):.3f}{spread}"]
        lines.append(f"| {' | '.join([*cells, *(_sent(group) if link else _spent(group))])} |")
    return "\n".join(lines)


def _sent(group: Sequence[Run]) -> list[str]:
    """Bytes and hours, means over seeds."""
    one = statistics.mean(
        run.total("bytes_up") / sum(len(row["cohort"]) for row in run.rows) for run in group
    )
    up, down, seconds = (
        statistics.mean(run.total(k) for run in group) for k in ("bytes_up", "bytes_down", "sim_seconds")
    )
    return [f"{one:.0f}", f"{up / 1e6:.2f}", f"{down / 1e6:.2f}", f"{seconds / 3600:.2f}"]


def _spent(group: Sequence[Run]) -> list[str]:
    """Epsilon, noise and relation, as the summaries say; the most of all seeds."""
    said = [run.summary["privacy"] for run in group if run.summary.get("privacy")]
    if not said:
        return ["-", "-", "-"]
    most = max(said, key=lambda one: one["epsilon"])
    return [f"{most['epsilon']:.2f}", f"{most['z']:.3f}", str(most["relation"])]


def draw_privacy(runs: Sequence[Run], last: Accuracies, path: Path) -> None:
    """Accuracy after the last round against epsilon, and against rounds by budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    sets = {
        "C = 1": {e: f"eps{e}" for e in BUDGETS},
        "adaptive C": {e: f"adaptive{e}" for e in ("2", "8")},
        "in turn, independent noise, C = 0.5": {"2": "independent2"},
        "in turn, banded noise, C = 0.5": {"2": "banded2"},
    }
    for at, (label, names) in enumerate(sets.items()):
        there = {float(e): list(last[n].values()) for e, n in names.items() if n in last}
        if there:
            middle = [statistics.mean(v) for v in there.values()]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in there.values()]
            x = [e * 1.03**at for e in there]
            left.errorbar(x, middle, spread, fmt="o-" if at == 0 else "s^D"[at - 1], capsize=3, label=label)
    if "clipped" in last:
        left.axhline(
            statistics.mean(last["clipped"].values()), color="grey", ls="--", label="clipped, no noise"
        )
    left.set(xscale="log", xlabel="epsilon of the run (delta 0.001)", ylabel="accuracy after the last round")
    left.set_xticks([float(e) for e in BUDGETS], BUDGETS)
    left.minorticks_off()
    for name in ("clipped", "eps8", "eps2", "eps1", "eps0.5"):
        if group := [run.series("accuracy") for run in runs if run.method == name]:
            right.plot(
                list(group[0]), [statistics.mean(one[r] for one in group) for r in group[0]], label=name
            )
    right.set(xlabel="round", ylabel="accuracy, mean over seeds")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def draw_link(runs: Sequence[Run], path: Path) -> None:
    """Accuracy, mean over seeds, against megabytes up and simulated hours so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, column, size, words in zip(
        panels,
        ("bytes_up", "sim_seconds"),
        (1e6, 3600),
        ("MB up, all clients", "simulated hours"),
        strict=True,
    ):
        for name in SHOWN:
            group = [run for run in runs if run.method == name]
            if not group:
                continue
            rounds = list(group[0].series("accuracy"))
            x = [statistics.mean(run.total(column, r) for run in group) / size for r in rounds]
            y = [statistics.mean(run.series("accuracy")[r] for run in group) for r in rounds]
            panel.plot(x, y, ".-", ms=3, label=name)
        panel.set(xscale="log", xlabel=words)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy, mean over seeds")
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
