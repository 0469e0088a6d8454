"""The experiments named after GGEUR's and FRAug's papers hold the settings of their tables."""

from __future__ import annotations

from typing import Any

import pytest
from composing import compose_quickly
from omegaconf import OmegaConf

CLIP = {
    "encoder.name": "ViT-B-16",
    "num_clients": 4,
    "clients_per_round": 4,
    "rounds": 50,
    "client.batch_size": 16,
}
GGEUR = {
    "strategy.target": None,  # 2000 rows a class, with several domains 500
    "strategy.per_prototype": 500,
    "strategy.scale": "sqrt",
    "strategy.boost": "none",
    "strategy.jitter": 0,
    "strategy.coverage": 1,
    "strategy.fill": "paper",
    "client.adam.beta1": 0.9,
    "client.adam.beta2": 0.999,
    "client.weight_decay": 0,
    "client.clip_norm": None,
    "client.lr_decay": 1,
}
FRAUG = {
    "num_clients": 4,
    "clients_per_round": 4,
    "rounds": 300,
    "strategy.rounds": 300,
    "client.lr": 0.01,
    "client.lr_decay": 1,
    "client.momentum": 0.5,
    "client.weight_decay": 0,
    "client.clip_norm": None,
    "strategy.momentum": 0.5,
    "strategy.proto_momentum": 0.3,
    "strategy.proto_init": "zero",
    "strategy.draws": 1,
    "strategy.lr_generator": 0.05,
    "strategy.latent": "normal",
    "strategy.latent_dim": None,  # half of 512
    "strategy.rtnet_loss": "entropy",
    "strategy.rtnet_bn": True,
    "strategy.share_model": "fedbn",
    "strategy.schedule": "exp",
}
SETTINGS: dict[tuple[str, ...], dict[str, Any]] = {
    ("experiment=ggeur_cifar100", "strategy=ggeur"): {
        **GGEUR,
        "encoder.name": "ViT-B-16",
        "num_clients": 10,
        "rounds": 100,
        "client.lr": 1e-3,
        "client.batch_size": 64,
        "client.epochs": 10,
        "partition.alpha": 0.5,
        "partition.per_class": 1,
    },
    ("experiment=ggeur_digits5", "strategy=ggeur"): {
        **GGEUR,
        **CLIP,
        "client.lr": 1e-2,
        "client.epochs": 10,
        "partition.share": 0.1,
        "data.domains": ["mnist", "usps", "svhn", "syn"],
    },
    ("experiment=ggeur_office_home", "strategy=ggeur"): {
        **GGEUR,
        **CLIP,
        "client.lr": 1e-3,
        "client.epochs": 1,
        "partition.alpha": 0.1,
        "partition.skew": "across",
        "data.test_folds": [0, 1, 2],
    },
    ("experiment=ggeur_pacs", "strategy=ggeur"): {
        **GGEUR,
        **CLIP,
        "client.lr": 1e-3,
        "partition.share": 0.3,
        "data.test_folds": [0, 1, 2],
    },
    ("experiment=fraug_digits", "strategy=fraug_digits"): {
        **FRAUG,
        "model.hidden": [2048, 512],
        "model.channels": [64, 64, 128],
        "client.batch_size": 64,
        "client.steps": 20,
        "partition.share": 0.01,
        "strategy.lr_rtnet": 0.05,
        "strategy.lam_generator": 1,
        "strategy.lam_rtnet": 1,
        "strategy.dist_generator": "L2",
        "strategy.dist_rtnet": "MMD_kernel",
        "strategy.interpolate": False,
        "strategy.gamma": 0.002,
        "strategy.share_generator": "all",
    },
    ("experiment=fraug_pacs", "strategy=fraug", "model.weights=file"): {
        **FRAUG,
        "client.batch_size": 32,
        "client.steps": 5,
        "partition.share": 0.1,
        "strategy.lr_rtnet": 0.05,
        "strategy.lam_generator": 10,
        "strategy.lam_rtnet": 1,
        "strategy.dist_generator": "MMD_kernel",
        "strategy.dist_rtnet": "L2",
        "strategy.interpolate": True,
        "strategy.gamma": None,  # 3 / 300
        "strategy.share_generator": "all",
    },
    ("experiment=fraug_officehome", "strategy=fraug_officehome", "model.weights=file"): {
        **FRAUG,
        "client.batch_size": 16,
        "client.steps": 10,
        "partition.share": 0.1,
        "strategy.lr_rtnet": 0.025,
        "strategy.dist_generator": "MMD_kernel",
        "strategy.dist_rtnet": "MMD_kernel",
        "strategy.interpolate": True,
        "strategy.gamma": None,
        "strategy.share_generator": "no_bn",
    },
}


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda overrides: overrides[0])
def test_settings_are_those_of_the_papers_tables(overrides: tuple[str, ...]) -> None:
    config = compose_quickly(overrides)
    expected = SETTINGS[overrides]
    found = {key: OmegaConf.select(config, key, throw_on_missing=True) for key in expected}
    assert {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in found.items()} == expected
