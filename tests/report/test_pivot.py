"""One setting down and another across."""

import pytest
from runfolder import make

from fedsim.errors import ConfigError
from fedsim.report import compared_blocks, default_plan, load_runs
from fedsim.report.pivot import pivot


def test_one_setting_down_and_another_across(tmp_path):
    for seed in range(3):
        for alpha in (1.0, 0.1):
            for at, method in enumerate(("fedavg", "x")):
                if (method, alpha, seed) != ("x", 0.1, 2):
                    value = 0.5 + (at - 0.5) * (alpha - 0.5) / 5 + seed / 100
                    make(tmp_path, method, seed, [value], partition={"alpha": alpha})
    runs = load_runs([tmp_path])
    plan = default_plan(runs)
    ((title, table),) = pivot(compared_blocks(runs, plan), plan, "method", "alpha")
    assert (title, list(table.header)) == ("", ["method", "alpha=0.1", "alpha=1.0"])
    cells = {row[0].text: row[1:] for row in table.rows}
    assert [c.text for c in cells["x"]] == ["46.50 ± 0.71²", "56.00 ± 1.00"]
    assert [[c.mark for c in row] for row in cells.values()] == [["", ""], ["", "best"]]
    assert table.below[0].startswith(
        "accuracy on test, mean of the last 1 evaluation (runs have fewer than 40), %"
    )
    with pytest.raises(ConfigError, match="--pivot alfa: the runs do not differ in it"):
        pivot(compared_blocks(runs, plan), plan, "alfa", "method")


def test_settings_of_a_methods_own_do_not_split_a_pivot(tmp_path):
    for method, rule in (("fedavg", "samples"), ("x", "uniform"), ("y", "uniform")):
        for alpha in (0.1, 1.0):
            own = {"strategy": {"_target_": f"strategies.{method}.X", "weighting": rule}}
            make(tmp_path, method, 0, [0.5], partition={"alpha": alpha}, **own)
    runs = load_runs([tmp_path])
    plan = default_plan(runs)
    ((title, table),) = pivot(compared_blocks(runs, plan), plan, "method", "alpha")
    assert (title, [row[0].text for row in table.rows]) == ("", ["fedavg", "x", "y"])
    assert "fedavg: weighting=samples; x, y: weighting=uniform" in table.below
