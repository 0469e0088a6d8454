"""Samples that one-shot methods made, and their ensembles' weights, in a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from one_shot_settings import METHODS, SMALL
from problems import classification

from fedsim.report import group_runs, load_runs
from fedsim.report.handed_over import models_table
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


def test_models_that_were_handed_over_are_in_the_report(tmp_path: Path) -> None:
    """Once, whoever began with them; of folders that say nothing of how good they are, and of broken ones, less."""
    words = ("rounds=1", f"out={tmp_path}/out", "evaluation.holdout=0.3")
    found = [
        classification().run(f"strategy={name}", *words, *METHODS[name]) for name in ("one_shot", "dense")
    ]
    path = found[0].dir / "uploads" / "uploads.json"
    line = (index := json.loads(path.read_text()))["clients"][1]
    html = models_table(group_runs(load_runs([r.dir for r in found])))
    assert html.count("<tr>") == 1 + 6 and html.count("dense, one_shot") == 6
    for accuracy in (line["train_accuracy"], line["own_test_accuracy"]):
        assert f'<td class="number">{100 * accuracy:.1f}</td>' in html
    for one in index["clients"]:
        del one["train_accuracy"], one["own_test_accuracy"]
    path.unlink()
    path.write_text(json.dumps(index))
    alone = group_runs(load_runs([found[0].dir]))
    assert models_table(alone).count('<td class="number">-</td>') == 12
    path.write_text("{}")
    assert models_table(alone) == ""
