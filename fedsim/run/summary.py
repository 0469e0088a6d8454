"""What a run comes to: rounds, weights, pictures and summary."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from fedsim.data import skew
from fedsim.data.federated import FederatedData
from fedsim.data.longtail import class_groups
from fedsim.engine.allocator import give_back
from fedsim.run.key import method_name, run_name, version
from fedsim.run.predictions import write_predictions
from fedsim.run.writing import write_texts
from fedsim.server import weightsfile
from fedsim.server.loop import Loop
from fedsim.task import room
from fedsim.task.task import Task
from fedsim.tracking.rows import OPEN_WORLD

VALIDATED = (  # of whose values the last is told; what is best is for who chooses by them
    *(f"{where}/{metric}" for where in ("val", "clients_val", "held_out") for metric in ("loss", "accuracy")),
    "participation_gap",
    "out_of_sample_gap",
    "attack_success",
)


def execute(loop: Loop, config: DictConfig, task: Task, data: FederatedData) -> dict[str, Tensor]:
    """Run the rounds, then write ``weights.safetensors`` and the pictures; returns the final state dict.

    Of a model that is frozen for the most part, both hold the rest, and the file says of what base it is.
    """
    large = loop.server.layout.dim * loop.server.dtype.itemsize > room.LARGE
    if large:
        give_back()  # what trying the model out took
    loop.run()
    if large:
        give_back()
    if (landing := loop.server.exchanger.landing) is not None:
        landing.at_end(loop.server.facts)
    weights = weightsfile.save(
        loop.folder / weightsfile.LAST, task, loop.server.dtype, loop.models()["global"]
    )
    if config.evaluation.predictions:
        write_predictions(loop, task, data, config.evaluation.batch_size)
    if config.evaluation.texts:
        write_texts(loop, task, data, config.evaluation.texts)
    if config.tracker.plots:
        _draw(loop, data)
    return weights


def record_partition(folder: Path, data: FederatedData) -> None:
    """Write who holds which samples and, where labels are classes, how skewed each client's are."""
    data.dealt.save(folder / "partition.npz")
    if data.local_test is not None:
        data.local_test.save(folder / "local_test.npz")
    if data.label_skew is not None:
        data.label_skew.save(folder / skew.FILE)


def _draw(loop: Loop, data: FederatedData) -> None:
    """Curves, and the partition as a heat map. A picture that fails costs a warning, not the run."""
    from fedsim.data.partition_picture import draw_partition
    from fedsim.report import figure_of

    try:
        figure_of({"run": [loop.history]}).savefig(loop.folder / "curves.png", dpi=150)
        y = data.all_labels()
        if loop.server.topology is not None:
            from fedsim.topology.graph_picture import draw_topology

            draw_topology(loop.server.topology, loop.folder / "topology.png")
        if y is not None and len(y):
            held = data.all_counts() if loop.server.task.by_class else None
            draw_partition(
                data.dealt,
                y.numpy(),
                data.dataset.classes,
                loop.folder / "partition.png",
                groups=None if held is None else class_groups(held),
                local_test=data.local_test,
            )
        for name, (x, labels) in loop.server.workshop.pictures.items():
            from fedsim.report.sample_picture import draw_samples

            draw_samples(x, labels, loop.folder / f"{name}.png")
        if loop.server.clock is not None:
            from fedsim.system.fleet_picture import draw_fleet

            draw_fleet(loop.server.clock, loop.folder / "devices.png")
    except Exception as e:
        logging.getLogger(__name__).warning("pictures of %s could not be drawn: %s", loop.folder, e)


def _samples(loop: Loop) -> dict[str, int]:
    """How many samples accuracies are shares of."""
    validator = loop.server.validator
    sizes = {
        "test_samples": loop.server.test_size,
        "validation_samples": validator.test_size if validator else 0,
    }
    return {name: size for name, size in sizes.items() if size}


def summarise(loop: Loop, config: DictConfig, data: FederatedData) -> dict[str, Any]:
    """What ``summary.json`` says of the finished rounds, beside its status."""
    rows = loop.history
    out: dict[str, Any] = {
        "method": method_name(config),
        "name": run_name(config),
        "fedsim": version(),
        "seed": config.seed,
        "rounds": loop.done,
        "key": loop.key,
        "partition_hash": data.dealt.hash(),
        "initial_hash": loop.server.start.hash(loop.server.layout),
        **_samples(loop),
        **({"personal": True} if loop.strategy.traits.personal else {}),
        **loop.server.facts,
    }
    if data.label_skew is not None:
        out["non_iid"] = data.label_skew.summary()
    labelled = ("pseudo/accuracy", "pseudo/precision", "pseudo/recall")
    for name in ("loss", "accuracy", "clients/loss", "clients/accuracy", *OPEN_WORLD, *labelled):
        values = [r[name] for r in rows if r.get(name) is not None]
        if values:
            out[name] = values[-1]
            known = [v for v in values if v == v] or values  # NaN is no best
            out[f"best_{name}"] = min(known) if name.endswith("loss") else max(known)
    for name in VALIDATED:
        if values := [r[name] for r in rows if r.get(name) is not None]:
            out[name] = values[-1]
    if config.evaluation.target is not None:
        reached = (r["round"] for r in rows if (r.get("accuracy") or 0) >= config.evaluation.target)
        out["rounds_to_target"] = next(reached, None)
    for name in ("bytes_up", "bytes_down", "seconds", "sim_seconds", "joules"):
        if any(r.get(name) is not None for r in rows):
            out[name] = sum(r.get(name) or 0 for r in rows)
    for phase in sorted({k for r in rows for k, v in r.items() if isinstance(v, dict) and "bytes_up" in v}):
        parts = [r[phase] for r in rows if phase in r]
        out[phase] = {k: sum(part[k] for part in parts) for k in ("bytes_up", "bytes_down", "seconds")}
    if thin := sum("thin_round" in r for r in rows):
        out["thin_rounds"] = thin
    if loop.stopped:
        out["stopped"] = loop.stopped
    if rows:
        out["weights_hash"] = rows[-1]["weights_hash"]
    return out
