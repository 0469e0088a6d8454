"""Pictures of boxes in a report: what each method's last run finds, against what is there, by domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.report import prose
from fedsim.report.runs import Group

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

FILE = "boxes.npz"
SURE = 0.3  # score from which a found box is drawn
TRUE, FOUND = "#009E73", "#D55E00"
WORDS = (
    "The first test images of each domain under the final model: dashed green is what is there, orange what is found "
    f"with a score of at least {SURE:g}."
)


def box_pictures(groups: Sequence[Group], out: Path, embedded: Callable[[bytes, str, str, str], str]) -> str:
    """HTML, each picture also as a file in ``out``; empty where no run wrote its boxes. ``embedded`` makes an image of
    a PNG's bytes."""
    from fedsim.report.curves import image

    html = []
    for number, (label, found) in enumerate(boxes_of(groups).items()):
        png = image(draw_boxes(found), "png", dpi=150)
        (out / f"boxes-{number}.png").write_bytes(png)
        shown = embedded(png, "png", f"Boxes found by {label} and those that are there", "card")
        html.append(f"<figure><figcaption>{escape(label)}</figcaption>{shown}</figure>")
    if not html:
        return ""
    return f'<h3>Boxes</h3>{prose.paragraph(WORDS, "soft")}<div class="grid">{"".join(html)}</div>'


def boxes_of(groups: Sequence[Group]) -> dict[str, Mapping[str, np.ndarray]]:
    """Content of the first run of each method that wrote its boxes (``evaluation.predictions=true``), by label."""
    import numpy as np

    out: dict[str, Mapping[str, np.ndarray]] = {}
    for group in groups:
        files = [Path(run.dir) / FILE for run in group.runs]
        if there := [file for file in files if file.is_file()]:
            with np.load(there[0]) as content:
                out[group.label] = dict(content)
    return out


def draw_boxes(found: Mapping[str, np.ndarray]) -> Figure:
    """Images of one run, a row for each domain."""
    import numpy as np
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(found["domains"].tolist()))
    rows = {name: np.flatnonzero(found["domains"] == name) for name in domains}
    wide = max(len(r) for r in rows.values())
    figure = Figure(figsize=(1.8 * wide, 1.95 * len(domains)), layout="constrained")
    axes = figure.subplots(len(domains), wide, squeeze=False)
    for line, (name, own) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, i in zip(line, own, strict=False):
            image = found["images"][i].transpose(1, 2, 0)
            axis.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", interpolation="nearest")
            _rectangles(axis, found["true_boxes"][i], found["true_labels"][i] >= 0, TRUE, "--")
            sure = (found["found_labels"][i] >= 0) & (found["found_scores"][i] >= SURE)
            _rectangles(axis, found["found_boxes"][i], sure, FOUND, "-")
            for box, label in zip(found["found_boxes"][i][sure], found["found_labels"][i][sure], strict=True):
                axis.text(box[0], box[1], found["classes"][label], fontsize=6, color=FOUND, va="bottom")
        line[0].set_title(name, fontsize=9, loc="left")
    return figure


def _rectangles(axis: Any, boxes: np.ndarray, chosen: np.ndarray, colour: str, dash: str) -> None:
    from matplotlib.patches import Rectangle

    for x1, y1, x2, y2 in boxes[chosen]:  # pixel centres are whole numbers on the axes, edges halves
        look: dict[str, Any] = {"fill": False, "edgecolor": colour, "linestyle": dash, "linewidth": 1.2}
        axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, **look))
