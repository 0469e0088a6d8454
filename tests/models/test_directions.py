"""Heads that compare directions."""

from __future__ import annotations

import pytest
import torch
from blobs import BLOBS
from torch import nn

import fedsim
from fedsim.errors import ConfigError
from fedsim.models import CNN, MLP, CosineHead, Linear, cosine


def test_logits_are_scaled_cosines_and_weights_are_those_of_the_linear_head() -> None:
    torch.manual_seed(0)
    plain = MLP((4,), 3, [5])
    torch.manual_seed(0)
    model = cosine((4,), 3, model=lambda shape, classes: MLP(shape, classes, [5]), scale=7.0)
    assert isinstance(model.head, CosineHead) and torch.equal(model.head.weight, plain.head.weight)
    x = torch.randn(6, 4)
    z = plain.features(x)
    w = plain.head.weight.detach()
    expected = [[7 * torch.cosine_similarity(a, b, dim=0) for b in w] for a in z.detach()]
    torch.testing.assert_close(model(x), torch.tensor(expected))
    torch.testing.assert_close(model.head(3 * z), model(x))
    assert not model.head(torch.zeros(1, 5)).any()


def test_what_has_no_linear_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="Identity has no linear head"):
        cosine((4,), 3, model=lambda shape, classes: nn.Identity())
    with pytest.raises(ConfigError, match=r"model\.scale=0: must be positive"):
        cosine((4,), 3, model=Linear, scale=0)
    assert isinstance(cosine((1, 8, 8), 3, model=CNN).head, CosineHead)


def test_methods_of_linear_heads_refuse_it_and_others_train_it() -> None:
    settings = [*BLOBS, "num_clients=3", "clients_per_round=3", "rounds=1", "engine=serial", "tracker=quiet"]
    assert "accuracy" in fedsim.simulate([*settings, "model=mlp_cosine"]).summary
    with pytest.raises(
        ConfigError, match=r"needs a linear head, this one compares directions; type model=mlp"
    ):
        fedsim.simulate([*settings, "model=mlp_cosine", "strategy=fedetf"])
