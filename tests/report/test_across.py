"""Several settings together: counts of verdicts, mean ranks, and when nothing is said."""

import numpy as np
import pytest
from runfolder import make
from scipy import stats

from fedsim.errors import ConfigError
from fedsim.report.across import friedman, resampled, signed_rank, summary
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


def test_the_bayesian_signed_rank_test():
    """Of one difference, w of which is Beta(1, .5): it wins if (1 - w)^2 < 1/2, in (1/2)^(1/4) of draws."""
    worse, same, better = signed_rank([1.0], 0.0)
    assert better == pytest.approx(0.5**0.25, abs=0.005) and worse == 0 and same == pytest.approx(1 - better)
    gains = [0.02, 0.01, 0.03, -0.01, 0.02]
    one, other = signed_rank(gains, 0.005), signed_rank([-d for d in gains], 0.005)
    assert one == other[::-1] and sum(one) == pytest.approx(1) and one[2] > 0.85
    assert signed_rank([0.001] * 5, 0.005)[1] == 1
    assert signed_rank([10 * d for d in gains], 0.05) == one


def test_the_hierarchical_bootstrap():
    """With one seed a setting it is that of the settings; seeds add their own spread."""
    means = np.random.default_rng(1).normal(size=40)
    mean, low, high = resampled([[m] for m in means])
    reach = 1.96 * means.std() / np.sqrt(40)
    assert mean == pytest.approx(means.mean())
    assert (high - low) / 2 == pytest.approx(reach, rel=0.05) and low < mean < high
    equal = resampled([[-1.0, 1.0]] * 40)
    assert equal[0] == 0 and (equal[2] - equal[1]) / 2 == pytest.approx(1.96 / np.sqrt(80), rel=0.06)
    assert resampled([[0.5], [0.5, 0.5, 0.5]]) == (0.5, 0.5, 0.5)


def test_what_is_asked_for_across_settings(tmp_path):
    for at in range(10):
        for seed in range(3):
            for method, gain in (("fedavg", 0), ("x", 0.02)):
                value = 0.5 + gain + seed / 100 + at / 100
                make(tmp_path, method, seed, [value], partition={"alpha": float(at + 1)})
    blocks = blocks_of(load_runs([tmp_path]), LAST)
    bayes = "  x vs fedavg: Bayesian signed-rank test over 10 settings: worse 0.0 %, equivalent within 0.5 0.0 %, "
    assert bayes + "better 100.0 %" in summary(blocks, LAST, "bayes")
    assert any(
        "mean difference over 10 settings +2 [+2, +2]" in x for x in summary(blocks, LAST, "bootstrap")
    )
    with pytest.raises(
        ConfigError, match="--across bootstrap: takes two methods compared in 10 settings or more"
    ):
        summary(blocks[:9], LAST, "bootstrap")
    with pytest.raises(ConfigError, match="in 5 settings or more; here it is 1"):
        summary(blocks[:1], LAST, "bayes")
