"""Fine-tuning a language model in federation: everything, low-rank adapters, single numbers, from one pretrained model.

    python -m experiments.language --model ../shared/data/gpt_histories --data ../shared/data/shakespeare
    python -m experiments.language ... --traces ../shared/data/traces      on measured phones: simulated seconds

Prints perplexity by tokens after some rounds, bytes and seconds of each method, and writes a report. The command can be
stopped and started again; finished runs are skipped. Further arguments are overrides for every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from fedsim.cli.main import command
from fedsim.report.runs import Run, load_runs

LORA = "model.lora={r: 4, alpha: 8, target_modules: [c_attn, c_proj, c_fc]}"
ZEROTH = ("one_byte", "fedkseed", "decomfl", "fedzo")  # of the strategies that there are
METHODS = {
    "full": ("strategy=fedavg", "strategy.weighting=samples", "client.lr=1e-3"),
    **{name: (f"strategy={name}", LORA) for name in ("fedit", "fedex", "flora", "rolora", "ffa", "fedsa")},
}
ROUNDS = (5, 10, 20)
PERSONAL = ("fedsa",)  # measured by each client's own model on its own test part


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
    parser.add_argument("--methods", default=",".join(available()), help="some of %(default)s")
    args, overrides = parser.parse_known_args()
    overrides += [f"model.path={args.model}", f"data.path={args.data}"]
    if args.traces:
        overrides += ["system=phones", "system/availability=always", f"system.traces={args.traces}"]
    codes = [
        command(
            [
                "-m",
                "experiment=language",
                f"method={name}",
                *available()[name],
                f"seed={args.seeds}",
                *overrides,
            ]
        )
        for name in args.methods.split(",")
    ]
    folder = Path(next((o.split("=", 1)[1] for o in overrides if o.startswith("out=")), "runs")) / "language"
    runs = load_runs([folder])
    print(table(runs))
    draw(runs, folder / "perplexity.png")
    return max(*codes, command(["report", str(folder)]))


def available() -> dict[str, tuple[str, ...]]:
    """Methods by name, with their overrides; those of zeroth order where this version has them."""
    there = {p.stem for p in (Path(__file__).parents[1] / "conf/strategy").glob("*.yaml")}
    return METHODS | {name: (f"strategy={name}",) for name in ZEROTH if name in there}


def measured(run: Run) -> dict[int, float]:
    """Perplexity by round: of the global model, or of the clients' own."""
    return run.series("clients/perplexity_pooled" if run.method in PERSONAL else "perplexity")


def draw(runs: list[Run], path: Path) -> None:
    """Perplexity against rounds, megabytes up and down, and simulated minutes where devices have a clock."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [run for run in runs if run.status == "done"]
    columns: dict[str, tuple[str, ...]] = {
        "round": (),
        "MB up and down, all clients": ("bytes_up", "bytes_down"),
    }
    if any(run.total("sim_seconds") for run in done):
        columns["simulated minutes"] = ("sim_seconds",)
    figure, panels = pyplot.subplots(
        1, len(columns), figsize=(4.2 * len(columns), 3.6), sharey=True, squeeze=False
    )
    for panel, (words, names) in zip(panels[0], columns.items(), strict=True):
        for i, method in enumerate(dict.fromkeys(run.method for run in done)):
            for run in (r for r in done if r.method == method):
                found, size = measured(run), 60 if names == ("sim_seconds",) else 1e6
                at = [sum(run.total(n, until=r) for n in names) / size if names else r for r in found]
                panel.plot(
                    at, list(found.values()), ".-", color=f"C{i}", label=method if run.seed == 0 else None
                )
        panel.set_xlabel(words)
        if names:
            panel.set_xscale("log")
    panels[0][0].set_ylabel("perplexity on the clients' test text")
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


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
            f"{statistics.mean(run.total(k) for run in group) / 1e6:.1f}" for k in ("bytes_up", "bytes_down")
        ]
        seconds = statistics.mean(run.total("sim_seconds") for run in group)
        minutes = f"{seconds / 60:.1f}" if seconds else "-"
        lines.append(f"| {' | '.join([method, *cells, *moved, minutes])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
