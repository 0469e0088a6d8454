"""Several settings together: counts of verdicts, mean ranks, and when nothing is said."""

import numpy as np
import pytest
from runfolder import make
from scipy import stats

from fedsim.report.across import friedman, summary
from fedsim.report.blocks import ComparisonPlan, blocks_of
from fedsim.report.objective import Objective
from fedsim.report.runs import load_runs

LAST = ComparisonPlan(Objective(at="last"))


def test_the_statistic_is_that_of_scipy_before_the_correction():
    ranks = stats.rankdata(np.random.default_rng(0).normal(size=(6, 4)), axis=1)
    mean, f, p = friedman(ranks)
    chi = stats.friedmanchisquare(*ranks.T).statistic
    assert f == pytest.approx(5 * chi / (6 * 3 - chi)) and p == pytest.approx(stats.f.sf(f, 3, 15))
    assert mean.sum() == pytest.approx(10)


def test_verdicts_are_counted_and_ranks_told_from_five_settings_on(tmp_path):
    for at, alpha in enumerate((0.1, 0.2, 0.3, 0.5, 1.0)):
        for seed in range(3):
            for method, gain in (("fedavg", 0), ("x", 0.02 if at else -0.02), ("y", 0.01)):
                value = 0.5 + gain + seed / 100 + at / 10
                make(tmp_path, method, seed, [value], partition={"alpha": alpha})
        lines = summary(blocks_of(load_runs([tmp_path]), LAST), LAST)
        if at == 0:
            assert lines == []
        assert any("mean ranks" in line for line in lines) == (at == 4)
    assert lines[:3] == ["over 5 settings", "  x vs fedavg: 4 better, 1 worse", "  y vs fedavg: 5 better"]
    assert lines[3] == "  mean ranks: x 1.40, y 1.80, fedavg 2.80"
    assert lines[-1] == "  settings of one data set are not independent of each other"
