"""What a detector finds in some test images: written down at the end of a run, drawn in the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import fedsim
from fedsim.report import group_runs, load_runs
from fedsim.report.boxpictures import FOUND, TRUE, box_pictures, boxes_of, draw_boxes

SMALL = "data.train={cloudy: 4, rainy: 4}"


def test_images_truth_and_boxes_by_domain(tmp_path: Path) -> None:
    settings = [
        "task=detection",
        "data=weather_shapes",
        SMALL,
        "data.domains=[cloudy,rainy]",
        "data.test=5",
        "data.side=32",
        "data.shapes=[9,16]",
    ]
    model = ["model=detector", "model.channels=[8,8,8,8,8]", "partition=domains", "num_clients=2"]
    rest = [
        "engine=serial",
        "tracker=quiet",
        "rounds=1",
        "clients_per_round=1",
        "client.epochs=1",
        f"out={tmp_path}",
    ]
    found = fedsim.simulate([*settings, *model, *rest, "evaluation.predictions=true"])
    groups = group_runs(load_runs([found.dir]))
    ((label, content),) = boxes_of(groups).items()
    assert label == "fedavg" and content["domains"].tolist() == ["cloudy"] * 3 + ["rainy"] * 3
    assert content["images"].shape == (6, 3, 32, 32) and content["images"].dtype == np.uint8
    assert content["classes"].tolist() == ["circle", "square", "triangle"]
    assert (content["true_labels"] >= 0).any(1).all() and content["found_boxes"].shape == (6, 20, 4)

    content = {**content, "found_labels": np.zeros((6, 20), int), "found_scores": np.zeros((6, 20))}
    content["found_scores"][:, 0] = 0.9
    figure = draw_boxes(content)
    colours = [p.get_edgecolor() for axis in figure.axes for p in axis.patches]
    import matplotlib.colors as names

    assert colours.count(names.to_rgba(FOUND)) == 6
    assert colours.count(names.to_rgba(TRUE)) == (content["true_labels"] >= 0).sum()
    html = box_pictures(groups, tmp_path, lambda png, *words: f"<img {words[1]}>")
    assert "<h3>Boxes</h3>" in html and (tmp_path / "boxes-0.png").is_file()
    assert box_pictures([], tmp_path, str) == ""
