"""The experiments on long-tailed data: settings, table, and what realigning does."""

from __future__ import annotations

import numpy as np
import pytest

import fedsim
from fedsim.api import run as run_config
from fedsim.config.check import validate
from fedsim.config.compose import compose, label_method
from fedsim.tracking import read_rows


@pytest.mark.parametrize("name", ["digits_lt", "cifar10_lt_small", "cifar10_lt", "cifar100_lt"])
def test_the_experiments_settings_are_possible(name):
    config = compose([f"experiment={name}"])
    validate(config)
    client = config.client
    assert (client.lr, client.momentum, client.weight_decay, client.clip_norm) == (0.03, 0.5, 0, None)
    assert config.evaluation.local_test and config.partition.sampled and config.partition.min_samples == 0


def test_the_experiments_table_reads_what_runs_wrote(tmp_path):
    from experiments import long_tail

    few = ["rounds=2", "evaluation.every=1", "evaluation.clients_every=1", "client.steps=2", "engine=serial"]
    settings = ["experiment=digits_lt", "model=mlp", f"out={tmp_path}", "tracker=quiet", *few]
    for label in ("fedavg_heads", "fedrep"):
        run_config(label_method(compose([*settings, f"method={label}", *long_tail.METHODS[label]]), label))
    frame = long_tail.table(tmp_path / "digits_lt").set_index("method")
    assert list(frame.index) == ["FedAvg", "FedAvg, realigned", "FedAvg, private head", "FedRep"]
    rows = read_rows(next(tmp_path.glob("digits_lt/fedavg_heads*")) / "metrics.jsonl")
    mean = 100 * np.mean([r["plain/accuracy"] for r in rows])
    assert frame.loc["FedAvg", "GM accuracy"] == pytest.approx(mean)
    own = 100 * np.mean([r["clients/phi/few/accuracy"] for r in rows])
    assert frame.loc["FedAvg, private head", "PM few"] == pytest.approx(own, nan_ok=True)
    assert np.isnan(frame.loc["FedRep", "GM accuracy"])
    text = long_tail.markdown(frame.reset_index())
    assert text.count("\n") == 5 and f"{mean:.1f}" in text
    long_tail.draw(frame.reset_index(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


@pytest.mark.nightly
def test_realigning_moves_accuracy_from_head_to_tail():
    """The specification's check in its direction, on few rounds: FedAvg's head on the long-tailed digits."""
    short = [
        "model=mlp",
        "rounds=15",
        "evaluation.every=15",
        "evaluation.clients_every=15",
        "client.epochs=3",
    ]
    options = ["strategy=fedloge", "strategy.train=head", "engine=serial", "tracker=quiet"]
    row = fedsim.simulate(["experiment=digits_lt", *short, *options]).rows[-1]
    assert row["few/accuracy"] > row["plain/few/accuracy"]
    assert row["medium/accuracy"] > row["plain/medium/accuracy"]
    assert row["accuracy"] > row["plain/accuracy"]
    assert np.std(row["class_accuracy"]) < np.std(row["plain/class_accuracy"])
