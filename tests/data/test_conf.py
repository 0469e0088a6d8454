"""Every option file of data, partition and model holds what its target takes, and nothing else."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"
FROM_THE_RUN = {"labels", "num_clients", "rng", "ids", "input_shape", "num_classes", "contract"}
FILES = sorted(file for group in ("data", "partition", "model") for file in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_keys_are_the_targets_arguments(file):
    node = OmegaConf.load(file)
    target = get_object(node._target_)
    parameters = set(inspect.signature(target).parameters)
    keys = {str(key) for key in node if str(key) not in ("_target_", "_partial_")}
    assert keys <= parameters
    assert parameters - keys <= FROM_THE_RUN
    assert all("#" in line for line in file.read_text().splitlines() if "_target_" not in line)


def test_defaults_build():
    data = instantiate(OmegaConf.load(CONF / "data/digits.yaml"))
    labels = data.train.y.numpy()
    for name in ("iid", "dirichlet", "shards", "quantity"):
        parts = instantiate(OmegaConf.load(CONF / f"partition/{name}.yaml"))(
            labels, 10, np.random.default_rng(0)
        )
        assert sum(map(len, parts)) == len(labels)
    for name in ("linear", "mlp", "mlp_xavier", "cnn", "resnet18"):
        shape = {"input_shape": data.input_shape, "num_classes": data.num_classes}
        model = instantiate(OmegaConf.load(CONF / f"model/{name}.yaml"), **shape)
        assert model(data.normalize(data.train.x[:2], next(model.parameters()).dtype)).shape == (2, 10)
