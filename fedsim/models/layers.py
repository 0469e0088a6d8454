"""Layers that several image models choose from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedsim.errors import ConfigError


def image_shape(shape: Sequence[int], name: str, smallest: int) -> tuple[int, int, int]:
    """``(C, H, W)``, refused with a ``ConfigError`` that names the model unless H and W are at least ``smallest``."""
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ConfigError(
            f"model={name} needs images (C, H, W) of at least {smallest}x{smallest} pixels, data gives "
            f"{tuple(shape)}; type model=mlp"
        )
    channels, height, width = shape
    return channels, height, width


def conv_layer(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """A padded convolution without bias, as a norm follows it."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def norm_layer(channels: int, norm: str, groups: int) -> nn.Module:
    """BatchNorm (``batch``) or GroupNorm (``group``); a ``ConfigError`` if ``groups`` does not divide ``channels``."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm != "group":
        raise ConfigError(f"model.norm={norm!r}: give 'group' or 'batch'")
    if groups < 1 or channels % groups:
        raise ConfigError(f"model.groups={groups} does not divide {channels} channels; give 1, 2, 4, ... 64")
    return nn.GroupNorm(groups, channels)
