"""Which test samples the final model classifies correctly, written down for comparisons."""

import numpy as np
import pytest
from blobs import run
from problems import classification, quadratic

from fedsim.report.blocks import ComparisonPlan, blocks_of
from fedsim.report.objective import Objective
from fedsim.report.runs import load_runs


def test_what_is_written_is_what_was_measured_and_changes_nothing():
    plain, found = run(), run("evaluation.predictions=true")
    with np.load(found.dir / "predictions.npz") as file:
        right = file["right"]
    assert right.dtype == bool and right.mean() == pytest.approx(found.rows[-1]["accuracy"])
    assert found.summary["test_samples"] == len(right)
    assert found.rows[-1]["weights_hash"] == plain.rows[-1]["weights_hash"]
    assert not (plain.dir / "predictions.npz").exists()


def test_without_class_labels_there_are_none(caplog):
    found = quadratic().run("evaluation.predictions=true")
    assert not (found.dir / "predictions.npz").exists() and "one class label a sample" in caplog.text


def test_two_runs_are_compared_over_other_samples(tmp_path):
    for seed in range(3):
        for name, rate in (("fedavg", 0.1), ("x", 0.3)):
            settings = ("evaluation.predictions=true", f"seed={seed}", f"client.lr={rate}")
            classification().run(*settings, f"method={name}", f"dir={tmp_path / f'{name}{seed}'}")
    runs = load_runs([tmp_path])
    last = Objective(at="last")
    narrow, wide = (
        blocks_of(runs, ComparisonPlan(last, population=p))[0].comparisons[0] for p in (False, True)
    )
    assert wide.mean == narrow.mean and wide.error > narrow.error and wide.df > narrow.df
