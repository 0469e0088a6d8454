"""U-Net: an image to a class, or several numbers, for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.models.layers import conv_layer, image_shape, norm_layer


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. 2015, padded and with GroupNorm: images (B, C, H, W) to logits (B, K, H, W).

    On the way down, two 3x3 convolutions at each size, then 2x2 max pooling; on the way up, the upsampled map is joined
    with the one of that size. Odd sizes are rounded down on the way down and met again on the way up.

    Args:
        input_shape: (C, H, W).
        num_classes: K.
        channels: at each size, from the largest image to the smallest.
        groups: groups of each GroupNorm; divides all channels.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, channels: Sequence[int], groups: int
    ) -> None:
        super().__init__()
        inputs, _, _ = image_shape(input_shape, "unet", smallest=2 ** (len(channels) - 1))
        self.down = nn.ModuleList(_twice(a, b, groups) for a, b in pairwise([inputs, *channels]))
        self.up = nn.ModuleList(_twice(a + b, a, groups) for a, b in reversed(list(pairwise(channels))))
        self.head = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W)."""
        maps: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            maps.append(x)
        for block, skip in zip(self.up, reversed(maps[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = block(torch.cat([skip, x], dim=-3))
        out: Tensor = self.head(x)
        return out


def _twice(inputs: int, outputs: int, groups: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [conv_layer(width, outputs, 3, 1), norm_layer(outputs, "group", groups), nn.ReLU()]
    return nn.Sequential(*layers)
