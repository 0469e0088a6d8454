"""What one-shot methods leave for a report: samples that they made, and how much each model counts in the ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from fedsim.report import prose
from fedsim.report.runs import Group, Run

FILE, WEIGHTS = "synthetic.png", "ensemble_weight"  # of a run folder; of a row: by client
WORDS = (
    "Samples of the last epoch, made without data, each under its label; and how much each client's model counts in "
    "the ensemble, as a share. Of the first run of each method that has them."
)


def made_samples(groups: Sequence[Group], out: Path, embedded: Callable[[bytes, str, str, str], str]) -> str:
    """HTML, each picture also as a file in ``out``; empty where no run has either. ``embedded`` makes an image of a
    PNG's bytes."""
    html = []
    for number, group in enumerate(groups):
        run = next((run for run in group.runs if (run.dir / FILE).is_file() or weights_of(run)), None)
        if run is None:
            continue
        shown = ""
        if (run.dir / FILE).is_file():
            png = (run.dir / FILE).read_bytes()
            (out / f"synthetic-{number}.png").write_bytes(png)
            shown = embedded(png, "png", f"Samples made by {group.label}", "card")
        shares = ", ".join(f"client {client}: {share:.2f}" for client, share in weights_of(run).items())
        words = ". ".join(filter(None, (group.label, shares)))
        html.append(f"<figure><figcaption>{escape(words)}</figcaption>{shown}</figure>")
    if not html:
        return ""
    return f'<h3>Made samples and ensembles</h3>{prose.paragraph(WORDS, "soft")}<div class="grid">{"".join(html)}</div>'


def weights_of(run: Run) -> dict[str, float]:
    """The share of each client's model after the last round; empty if none is told."""
    rows = (row[WEIGHTS] for row in reversed(run.rows) if isinstance(row.get(WEIGHTS), dict))
    found: dict[str, float] = next(rows, {})
    total = sum(found.values())
    return {client: w / total for client, w in found.items()} if total > 0 else {}
