"""Colours of a sweep over several problems: an arm looks the same in all figures of a report, in the table's order."""

import re

from matplotlib.colors import to_hex
from runfolder import make

from fedsim.cli.main import command
from fedsim.report import curves, load_runs
from fedsim.report.blocks import ComparisonPlan, blocks_of
from fedsim.report.metriccurves import figure_of_metric


def mixed(root):
    for alpha in (0.1, 1.0):
        for method, gain in (("fedavg", 0.0), ("fedprox", 0.1), ("scaffold", 0.2)):
            for seed in (0, 1, 2):
                make(
                    root,
                    method,
                    seed,
                    [0.3, 0.4 + gain + alpha / 10 + seed / 50],
                    folder=f"{method}-a{alpha}-s{seed}",
                    partition={"alpha": alpha},
                )


def colours(figure):
    return {
        line.get_label(): to_hex(line.get_color())
        for line in figure.axes[0].get_lines()
        if not line.get_label().startswith("_")
    }


def test_an_arm_has_one_colour_in_all_figures_and_axes_say_what_they_show(tmp_path):
    mixed(tmp_path)
    plan = ComparisonPlan()
    blocks = blocks_of(load_runs([tmp_path]), plan)
    curves = figure_of_metric(blocks, plan, "accuracy")
    own = colours(curves)
    assert curves.axes[0].get_ylabel() == "accuracy" and len(set(own.values())) == 6
    for label, colour in colours(figure_of_metric(blocks, plan, "diff")).items():
        assert own[label.partition(" - ")[0]] == colour
    swept = figure_of_metric(blocks, plan, "partition.alpha").axes[0].containers
    looks = {one.get_label(): to_hex(one.lines[0].get_color()) for one in swept}
    assert looks == {name: own[f"{name}, alpha=0.1 (n=3)"] for name in ("fedavg", "fedprox", "scaffold")}
    assert command(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    legend = re.findall(r"(fedavg|fedprox|scaffold), alpha=([\d.]+) \(n=3\)", page)[:6]
    methods = ["fedavg", "fedprox", "scaffold"]
    assert legend == [(method, alpha) for alpha in ("0.1", "1.0") for method in methods]


def test_a_figure_is_as_wide_as_its_longest_label() -> None:
    """The legend of one panel, as ``--curves`` draws it, is not cut off."""
    figure, axes = curves.one_panel()
    axes.plot([1, 2], [0, 1], label=", ".join(f"setting{i}=True" for i in range(8)))
    curves.titled(figure)
    curves.image(figure, "png")
    assert figure.texts[0].get_window_extent().x1 <= figure.bbox.x1
