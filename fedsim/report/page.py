"""The report of several runs as a folder: one self-contained ``report.html``, its figures, and the table as files."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from fedsim.errors import DataError
from fedsim.report import clientpoints, heterogeneity, prose
from fedsim.report.boxpictures import box_pictures
from fedsim.report.budget import budget_table
from fedsim.report.handed_over import models_table
from fedsim.report.latex import to_latex
from fedsim.report.openclasses import open_table
from fedsim.report.runs import Group, Run
from fedsim.report.sample_section import made_samples
from fedsim.report.tables import html_table, layout, to_csv, to_html
from fedsim.report.texts import text_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fedsim.report.curves import Axis

MAX_VECTOR_POINTS = 20_000  # of a panel; with more, it is drawn in pixels
MAX_PANELS = (
    28  # labels that a legend of its own can tell apart; with more, the page shows the files' pictures
)
PNG_DPI = 150  # of the pictures of partitions
LIVE = "<!-- live -->\n"
OPEN_PARTITIONS = 4  # further ones are folded away


def write_report(
    groups: Sequence[Group], frame: pd.DataFrame, out: str | Path, commands: Sequence[str] = ()
) -> Path:
    """Write ``report.html``, ``table.csv``, ``table.tex`` and the figures (.png) into the folder ``out``.

    ``groups`` and ``frame`` are of the same runs (:func:`fedsim.report.group_runs`, :func:`fedsim.report.compare`);
    ``commands`` are shown as the ones to type again. Returns the page's path.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.csv").write_text(to_csv(frame), encoding="utf-8")
    (out / "table.tex").write_text(to_latex(layout(frame)), encoding="utf-8")
    parts = {
        "title": escape(prose.title(groups)),
        "lead": escape(prose.lead(groups)),
        "facts": prose.facts(groups),
        "results": _results(frame)
        + budget_table(groups)
        + open_table(groups)
        + text_table(groups)
        + box_pictures(groups, out, _embedded)
        + models_table(groups)
        + made_samples(groups, out, _embedded),
        "curves": _curves(groups, out),
        "clients": _clients(groups, out),
        "partition": _partitions(groups, out),
        "configuration": prose.configuration(groups),
        "failures": prose.failures(groups),
        "reproduce": prose.reproduce(groups, commands),
    }
    page = out / "report.html"
    page.write_text(filled(parts), encoding="utf-8")
    return page


def filled(parts: Mapping[str, str]) -> str:
    """The page with the HTML of its ``parts``; ``LIVE`` stands where a live view puts how runs get on."""
    return Template(shipped("page.html")).substitute({"script": shipped("page.js"), "live": LIVE}, **parts)


def shipped(name: str) -> str:
    """A text file that lies beside this module."""
    return files("fedsim.report").joinpath(name).read_text(encoding="utf-8")


def _results(frame: pd.DataFrame) -> str:
    target = frame.attrs.get("target")
    words = [
        "± is the sample standard deviation over the n seeds that are finished, not the standard error. Differences "
        "are to the reference, over common seeds, with 95 % intervals.",
        ""
        if target is None
        else f"Rounds to {100 * target:g} % count to the first evaluation at or above it.",
        "Traffic is what all clients sent and received.",
        "Simulated time is that of the configured devices." if "sim_seconds" in frame else "",
        "★ marks what is better than all others of its problem, by a paired test over seeds; ☆ several equivalent "
        "leaders.",
    ]
    return to_html(frame) + prose.paragraph(" ".join(filter(None, words)), "soft")


def _curves(groups: Sequence[Group], out: Path) -> str:
    """Each metric against rounds, traffic, time and, where powers are known, energy; the same as files."""
    from fedsim.report import curves

    histories = curves.histories_of(groups)
    rows = [row for seeds in histories.values() for one in seeds for row in one]
    metrics = [m for m in ("accuracy", "loss") if any(row.get(m) is not None for row in rows)]
    if not metrics:
        return prose.paragraph("No round was evaluated yet.")
    simulated, powered = (any(row.get(column) for row in rows) for column in ("sim_seconds", "joules"))
    sections = [
        ("rounds", "Against rounds", curves.ROUNDS),
        ("traffic", "Against traffic", curves.TRAFFIC),
        ("seconds", "Against computing time", curves.SECONDS),
        *([("simulated", "Against simulated time", curves.SIMULATED)] if simulated else []),
        *([("energy", "Against energy", curves.ENERGY)] if powered else []),
    ]
    several = any(len(group.runs) > 1 for group in groups)
    text = (
        "A line is the mean over the seeds, its band one standard deviation to either side."
        if several
        else ""
    )
    html, legend = (
        [prose.paragraph(text, "soft")] if text else [],
        _legend(list(histories)[: curves.MAX_CURVES], curves.looks()),
    )
    for name, words, axis in sections:
        png = curves.image(curves.draw(histories, axis), "png", dpi=150)
        (out / f"curves-{name}.png").write_bytes(png)
        if len(histories) > MAX_PANELS or len(rows) > MAX_VECTOR_POINTS:  # once is long enough
            shown = _embedded(png, "png", f"{' and '.join(metrics)} {words.lower()}", "ink")
            html.append(f'<div class="block"><h3>{words}</h3>\n<figure class="wide">{shown}</figure></div>')
            continue
        panels = "".join(_panel(histories, metric, words, axis, len(rows)) for metric in metrics)
        html.append(f'<div class="block"><h3>{words}</h3>\n{legend}<div class="grid">{panels}</div></div>')
    names = [m for m in curves.PSEUDO if any(row.get(m) is not None for row in rows)]
    if names and len(histories) <= MAX_PANELS:
        panels = "".join(_panel(histories, m, "against rounds", curves.ROUNDS, len(rows)) for m in names)
        html.append(
            f'<div class="block"><h3>Pseudo labels</h3>\n{legend}<div class="grid">{panels}</div></div>'
        )
    return "\n".join(html)


def _panel(histories: Mapping[str, Sequence[Any]], metric: str, words: str, axis: Axis, points: int) -> str:
    from fedsim.report import curves

    figure = curves.panel(histories, metric, axis)
    title = (curves.TITLES | curves.PSEUDO)[metric]
    return f"<figure><figcaption>{title}</figcaption>{_picture(figure, f'{title} {words.lower()}', points)}</figure>"


def _picture(figure: Figure, alt: str, points: float, png: bytes = b"") -> str:
    """The figure as an image on a transparent ground, in vectors if that stays small, else as it is in ``png``."""
    from fedsim.report.curves import image

    if points <= MAX_VECTOR_POINTS:
        return _embedded(image(figure, "svg", transparent=True), "svg+xml", alt, "ink")
    return _embedded(png or image(figure, "png", transparent=True, dpi=200), "png", alt, "ink")


def _embedded(data: bytes, kind: str, alt: str, name: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    inches = int.from_bytes(data[16:20], "big") / PNG_DPI if name == "card" else 0
    width = f' width="{round(96 * inches)}"' if inches else ""
    return f'<img class="{name}"{width} alt="{escape(alt)}" src="{source}">'


def _legend(labels: Sequence[str], looks: Iterable[tuple[str, str]]) -> str:
    dashes = {"-": "", "--": "7 3", ":": "2 2", "-.": "8 3 2 3"}
    items = []
    for label, (colour, dash) in zip(labels, looks, strict=False):
        look = f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes[dash]}"'
        line = f'<line x1="0" y1="5" x2="32" y2="5" {look}/>'
        swatch = f'<svg class="ink" width="32" height="10" aria-hidden="true">{line}</svg>'
        items.append(f"<li>{swatch}{escape(label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>\n'


def _clients(groups: Sequence[Group], out: Path) -> str:
    """How a metric spreads over the clients, the clients of all seeds together."""
    from fedsim.report.curves import image, spread

    found = {run.dir: clientpoints.last(run, "accuracy") for group in groups for run in group.runs}
    metrics = sorted({metric for values in found.values() for metric in values})
    html = []
    for metric in metrics:
        pooled = {
            group.label: [value for run in group.runs for value in found[run.dir].get(metric, {}).values()]
            for group in groups
        }
        figure = spread(pooled, f"{metric.rpartition('/')[2]} of a client")
        name = f"clients-{metric.replace('/', '-')}.png"
        png = image(figure, "png", dpi=150)
        (out / name).write_bytes(png)
        html.append(prose.paragraph(_SPREAD.get(metric, f"{metric}, as clients reported it.")))
        points = sum(map(len, pooled.values())) if len(pooled) <= MAX_PANELS else math.inf  # drawn once then
        html.append(f"<figure>{_picture(figure, f'{metric} over clients', points, png)}</figure>")
        html.append(_spread_table(pooled))
    if not html:
        return prose.paragraph(
            "No accuracy of single clients was recorded. evaluation.holdout=0.2 evaluation.clients_every=10 "
            "sets a part of each client's samples aside and measures on it every ten rounds."
        )
    dots = "A dot is a client (of any seed), the box holds the middle half, the line the middle 90 %."
    return "\n".join([*html, prose.paragraph(dots, "soft"), _against_size_and_skew(groups, found, out)])


def _against_size_and_skew(groups: Sequence[Group], found: clientpoints.Measured, out: Path) -> str:
    """Accuracy on own test samples against how many training samples a client has, and how skewed their labels are."""
    points, remark = clientpoints.points(groups, found)
    title = "<h3>Accuracy against size and skew</h3>"
    if not any(points.values()):
        return title + prose.paragraph(remark)
    from fedsim.report.curves import image, looks

    figure = clientpoints.draw(points)
    picture = image(figure, "png", dpi=150)
    (out / "clients-size-skew.png").write_bytes(picture)
    shown = _picture(figure, clientpoints.ALT, sum(map(len, points.values())), picture)
    drawn = {
        label: colour for (label, some), (colour, _) in zip(points.items(), looks(), strict=False) if some
    }
    legend = _legend(list(drawn), [(colour, "-") for colour in drawn.values()])
    words = prose.paragraph(" ".join(filter(None, (clientpoints.WORDS, remark))), "soft")
    return f'{title}\n{legend}<figure class="wide">{shown}</figure>\n{words}'


_SPREAD = {
    "evaluate/accuracy": "The global model (or the client's own, where the method keeps one) on each client's held-out "
    "samples, in the last round in which that was measured.",
    "test/accuracy": "Each client's own model on the common test set, in the last round in which that was measured.",
}


def _spread_table(pooled: Mapping[str, Sequence[float]]) -> str:
    rows = []
    for label, values in pooled.items():
        if not values:
            continue
        worst = sorted(values)[: max(1, round(len(values) / 10))]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        numbers = (statistics.fmean(values), std, statistics.fmean(worst), min(values))
        cells = [(f"{100 * number:.2f}", "") for number in numbers]
        rows.append([(label, ""), (str(len(values)), ""), *cells])
    header = ["method", "values", "mean, %", "std over clients, %", "mean of worst tenth, %", "worst, %"]
    return html_table(header, rows, [False, *[True] * 5], "plain")


def _partitions(groups: Sequence[Group], out: Path) -> str:
    """A picture per distinct partition: the run's own heat map, or the sizes of its clients."""
    users: dict[str, list[tuple[Group, Run]]] = {}
    missing = 0
    for group in groups:
        for run in group.runs:
            name = prose.partition_hash(run)
            users.setdefault(name, []).append((group, run)) if name else None
            missing += not name
    html = [heterogeneity.table(groups)]
    for number, (name, pairs) in enumerate(users.items()):
        picture, remark = _partition_picture(name, [run for _, run in pairs], out)
        caption = f"Partition {name[:8]}: {prose.who(pairs, len(groups))}. {remark}"
        html.append(
            f'<figure class="wide">{picture}<figcaption>{escape(caption.strip())}</figcaption></figure>'
        )
        if number == OPEN_PARTITIONS - 1 and len(users) > OPEN_PARTITIONS:
            more = prose.count(len(users) - OPEN_PARTITIONS, "more partition")
            html.append(f"<details><summary>{more}</summary>")
    if len(users) > OPEN_PARTITIONS:
        html.append("</details>")
    if missing:
        html.append(prose.paragraph(f"{prose.count(missing, 'run')} without a recorded partition.", "soft"))
    return "\n".join(html)


def _partition_picture(name: str, runs: Sequence[Run], out: Path) -> tuple[str, str]:
    """The picture, also written to ``out``, and what to say of it."""
    target = out / f"partition-{name[:8]}.png"
    drawn = next((path for run in runs if (path := run.dir / "partition.png").is_file()), None)
    stored = next((path for run in runs if (path := run.dir / "partition.npz").is_file()), None)
    if drawn is not None:
        words, remark = "Samples per client and class", ""
        target.write_bytes(drawn.read_bytes())
    elif stored is not None:
        from fedsim.data.partition_picture import draw_sizes
        from fedsim.data.shards import Shards

        words = "Samples per client"
        remark = "Without classes: no run folder holds a partition.png (tracker.plots=true draws it)."
        try:
            draw_sizes(Shards.load(stored), target)
        except DataError as error:
            return "", f"Not drawn: {error}."
    else:
        return "", "No run folder holds a picture or the partition itself."
    return _embedded(target.read_bytes(), "png", words, "card"), remark
