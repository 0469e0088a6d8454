"""Fine-tuning a language model in federation: everything, low-rank adapters, single numbers, from one pretrained model.

    python -m experiments.language --model ../shared/data/gpt_histories --data ../shared/data/shakespeare
    python -m experiments.language ... --traces ../shared/data/traces      on measured phones: simulated seconds

Prints perplexity by tokens after some rounds, bytes and seconds of each method, and writes a report and the picture of
docs/results/language.md. The command can be stopped and started again; finished runs are skipped. Further arguments
are overrides for every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsim.cli.main import command
from fedsim.config.words import last_of_each
from fedsim.report.runs import Run, load_runs

LORA = "model.lora={r: 4, alpha: 8, target_modules: [c_attn, c_proj, c_fc]}"
SLOPES = (LORA, "strategy.lr=0.02", "evaluation.clients_every=0")  # all clients have the same model
SGD = (
    LORA,
    "client=sgd",
    "client.lr=0.02",
    "client.steps=2",
    "client.batch_size=8",
    "evaluation.clients_every=0",
)
METHODS = {
    "full": ("strategy=fedavg", "strategy.weighting=samples", "client.lr=1e-3"),
    **{name: (f"strategy={name}", LORA) for name in ("fedit", "fedex", "flora", "rolora", "ffa", "fedsa")},
    "one_byte": ("strategy=one_byte", *SLOPES, "strategy.samples=4", "rounds=150"),
    "decomfl": ("strategy=decomfl", *SLOPES, "strategy.directions=4", "rounds=50"),
    "mezo": ("strategy=mezo", *SLOPES, "strategy.lr=6e-4", "strategy.local_steps=32", "rounds=50"),
    "fedkseed": ("strategy=fedkseed", *SLOPES, "strategy.lr=5e-3", "strategy.local_steps=4", "rounds=50"),
    "fedzo": ("strategy=fedzo", *SGD, "strategy.directions=3", "rounds=50"),
}
ROUNDS = (5, 10, 20, 50, 100, 150)
PERSONAL = ("fedsa",)  # measured by each client's own model on its own test part
PICTURED = ("full", "fedit", "ffa", "rolora", "one_byte")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the pretrained model and its tokenizer"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with speeches.parquet")
    parser.add_argument("--traces", type=Path, help="folder of the device traces: runs on measured phones")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="default: %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of %(default)s")
    parser.add_argument("--picture", type=Path, help="default: perplexity.png beside the runs")
    parser.add_argument("--drawn", default=",".join(PICTURED), help="methods in it, default: %(default)s")
    args, overrides = parser.parse_known_args()
    overrides += [f"model.path={args.model}", f"data.path={args.data}"]
    if args.traces:
        overrides += ["system=phones", "system/availability=always", f"system.traces={args.traces}"]
    codes = [
        command(
            last_of_each(
                [
                    "-m",
                    "experiment=language",
                    f"method={name}",
                    *METHODS[name],
                    f"seed={args.seeds}",
                    *overrides,
                ]
            )
        )
        for name in args.methods.split(",")
    ]
    folder = Path(next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs")) / "language"
    runs = load_runs([folder])
    print(table(runs))
    draw(runs, args.picture or folder / "perplexity.png", args.drawn.split(","))
    return max(*codes, command(["report", str(folder)]))


def measured(run: Run) -> dict[int, float]:
    """Perplexity by round: of the global model, or of the clients' own."""
    return run.series("clients/perplexity_pooled" if run.method in PERSONAL else "perplexity")


def draw(runs: list[Run], path: Path, methods: Sequence[str]) -> None:
    """Perplexity against megabytes up and down, and against simulated hours where devices have a clock, else rounds;
    a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = {m: [run for run in runs if run.status == "done" and run.method == m] for m in methods}
    clocked = any(run.total("sim_seconds") for group in done.values() for run in group)
    panels: dict[str, Callable[[Run, int], float]] = {
        "megabytes up and down, all clients": lambda run, r: _moved(run, r) / 1e6,
        "simulated hours on phones" if clocked else "round": lambda run, r: (
            run.total("sim_seconds", until=r) / 3600 if clocked else r
        ),
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 3.8), sharey=True, squeeze=False)
    for axis, (words, place) in zip(axes[0], panels.items(), strict=True):
        for i, (method, group) in enumerate(done.items()):
            for j, run in enumerate(group):
                found = measured(run)
                at = [place(run, r) for r in found]
                axis.plot(at, list(found.values()), ".-", color=f"C{i}", label=method if not j else None)
        axis.set_xlabel(words)
        axis.set_xscale("log" if words != "round" else "linear")
        axis.set_yscale("log")
        axis.set_yticks([25, 30, 40, 60], labels=["25", "30", "40", "60"])
        if words.startswith("simulated"):
            axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], labels=["0.02", "0.05", "0.1", "0.2", "0.5"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("perplexity on the clients' test text")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _moved(run: Run, until: int) -> float:
    return run.total("bytes_up", until=until) + run.total("bytes_down", until=until)


def table(runs: list[Run]) -> str:
    """Markdown: perplexity of each seed after some rounds, megabytes, and on phones simulated minutes."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "done":
            methods.setdefault(run.method, []).append(run)
    head = ["method", *(f"round {r}" for r in ROUNDS), "up MB", "down MB", "minutes"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, group in methods.items():
        found = [[measured(run).get(r) for run in group] for r in ROUNDS]
        cells = [" ".join(f"{v:.2f}" for v in values if v is not None) or "-" for values in found]
        moved = [
            f"{statistics.mean(run.total(k) for run in group) / 1e6:.4g}" for k in ("bytes_up", "bytes_down")
        ]
        seconds = statistics.mean(run.total("sim_seconds") for run in group)
        minutes = f"{seconds / 60:.1f}" if seconds else "-"
        lines.append(f"| {' | '.join([method, *cells, *moved, minutes])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
