"""Samples that one-shot methods made, and their ensembles' weights, in a report."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_shot_settings import SMALL
from problems import classification

from fedsim.report import group_runs, load_runs
from fedsim.report.sample_section import FILE, made_samples, weights_of
from fedsim.tracking.rows import scalars


def test_weights_by_client_and_pictures_are_in_the_report(tmp_path: Path) -> None:
    words = ("strategy=co_boosting", *SMALL, "rounds=2", f"out={tmp_path}/out")
    found = classification(cohorts=[[0, 2, 5], []]).run(*words)
    last = found.rows[-1]
    assert list(last["ensemble_weight"]) == ["0", "2", "5"]
    assert list(last["ensemble_weight"].values()) == last["ensemble_weights"]
    assert scalars(last)["ensemble_weight/5"] == last["ensemble_weights"][2]
    groups = group_runs(load_runs([found.dir]))
    shares = weights_of(groups[0].runs[0])
    assert sum(shares.values()) == pytest.approx(1)
    html = made_samples(groups, tmp_path, str)
    assert f"client 5: {shares['5']:.2f}" in html and "<img" not in html
    (found.dir / FILE).write_bytes(b"picture")
    html = made_samples(groups, tmp_path, lambda png, *words: f"<img {words[1]}>")
    assert "<img Samples made by" in html and (tmp_path / "synthetic-0.png").read_bytes() == b"picture"
    assert made_samples([], tmp_path, str) == ""
