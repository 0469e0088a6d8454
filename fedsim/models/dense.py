"""Fully connected models of the flattened input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedsim.models.base import Model


class Linear(Model):
    """Multinomial logistic regression on the flattened input; the features are the input itself."""

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(math.prod(input_shape), num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The flattened input ``(B, prod(input_shape))``."""
        return x.flatten(1)


class MLP(Model):
    """Fully connected ReLU network; ``hidden`` are the layers' widths ([200, 200] is McMahan et al.'s
    2NN), with ``batch_norm`` a BatchNorm before each ReLU."""

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int], batch_norm: bool = False
    ) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        self.batch_norm = batch_norm
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) if batch_norm else nn.Identity() for b in hidden)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Output of the last hidden layer ``(B, hidden[-1])``."""
        x = x if x.dim() == 2 else x.flatten(1)
        if not self.batch_norm:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        return x
