"""What the page says of partitions and of single clients, and whether its colours can be read."""

import re

import numpy as np
import pytest
from runfolder import make

from fedsim.data.skew import skew_of_counts
from fedsim.report import clientpoints, compare, group_runs, heterogeneity, load_runs
from fedsim.report.page import shipped, write_report


def report(root):
    runs = load_runs([root])
    return write_report(group_runs(runs), compare(runs), root / "report").read_text()


def test_how_far_partitions_are_from_identical_clients(tmp_path):
    """Two partitions of one kind are one line with their means; a client of a group is a point at its size and skew."""
    skew = skew_of_counts(np.array([[4, 0], [0, 4], [1, 1]]))
    for seed, js in ((0, 0.2), (1, 0.4)):
        measures = {
            "js": js,
            "emd": 1.0,
            "hellinger": 0.5,
            "size_cv": 0.25,
            "smallest": 2,
            "largest": 4 + seed,
        }
        summary = {"partition_hash": f"{seed}" * 64, "non_iid": measures}
        points = [(1, c, "evaluate/accuracy", 0.25 * (c + seed)) for c in range(3)]
        folder = make(tmp_path, "fedavg", seed, [0.5], summary=summary, clients=points, num_clients=3)
        skew.save(folder / "skew.npz")
    make(tmp_path, "fedprox", 0, [0.5], num_clients=3)
    groups = group_runs(load_runs([tmp_path]))
    numbers = "JS 0.300, EMD 1.000, Hellinger 0.500, size variation 0.250, samples 2 to 5"
    assert list(heterogeneity.lines(groups)) == [f"- (alpha=0.1), 3 clients: 2 partitions, {numbers}"]
    page = report(tmp_path)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page[page.index("- (alpha=0.1), 3 clients") :])
    assert cells[:6] == ["2", "0.300", "1.000", "0.500", "0.250", "2 to 5"]
    measured = {run.dir: clientpoints.last(run, "accuracy") for group in groups for run in group.runs}
    found, remark = clientpoints.points(groups, measured)
    assert [point.samples for point in found["fedavg"]] == [4, 4, 2] and found["fedprox"] == []
    assert [point.accuracy for point in found["fedavg"]] == pytest.approx(
        [0.125, 0.375, 0.625]
    )  # of two seeds each
    assert [point.js for point in found["fedavg"]] == pytest.approx([0.311278, 0.311278, 0], abs=1e-6)
    assert remark == clientpoints.NOT_MEASURED and remark.replace("'", "&#x27;") in page
    left, right = clientpoints.draw(found).axes
    assert left.lines[0].get_xydata()[2].tolist() == pytest.approx([2, 0.625])
    assert right.lines[0].get_xydata()[2].tolist() == pytest.approx([0, 0.625])
    assert (tmp_path / "report" / "clients-size-skew.png").read_bytes().startswith(b"\x89PNG")


def test_clients_of_runs_that_recorded_no_sizes(tmp_path):
    make(tmp_path, "fedavg", 0, [0.5], clients=[(1, 0, "evaluate/accuracy", 0.5)])
    assert "Sizes and skew of clients were not recorded" in report(tmp_path)


def test_colours_can_be_read():
    """Contrast of text of at least 4.5 to 1 (WCAG 2, AA) on both grounds, light and dark."""

    def luminance(colour):
        full = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
        parts = [int(full[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    names = ("ink", "soft", "paper", "tint", "lead", "warn")
    pattern = ".*?".join(rf"--{name}: (#\w+);" for name in names)
    palettes = re.findall(pattern, shipped("page.html"))
    assert len(palettes) == 4  # light, dark by the system, dark by choice, print
    for ink, soft, paper, tint, lead, warn in palettes:
        for text in (ink, soft, lead, warn):
            for ground in (paper, tint):
                high, low = sorted((luminance(text), luminance(ground)), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
