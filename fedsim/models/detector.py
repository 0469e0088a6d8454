"""A small anchor-free detector: for every cell of an image, whether there is an object, which one, and its box."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.models.layers import conv_layer, image_shape, norm_layer

STRIDE = 4  # pixels of a cell's side


class Detector(nn.Module):
    """Images (B, 3, H, W) to numbers of cells (B, 1 + C + 4, H/4, W/4): objectness logit, class logits, box.

    In the manner of FCOS (Tian et al. 2019): a box is four distances from the cell's centre, ``STRIDE * softplus`` of
    its numbers, to left, top, right and bottom. ``fedsim.task.boxes`` has the loss and makes boxes of the numbers.
    Parameters of the three parts are ``backbone.*``, ``neck.*`` and ``head.*``.

    Args:
        input_shape: (C, H, W); H and W are multiples of 8.
        num_classes: C.
        channels: of the backbone's five blocks of convolution, GroupNorm and SiLU, with strides 2, 2, 1, 2, 1.
        groups: groups of each GroupNorm; divides all channels.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, channels: Sequence[int], groups: int
    ) -> None:
        super().__init__()
        inputs, height, width = image_shape(input_shape, "detector", smallest=16)
        if height % 8 or width % 8:
            raise ConfigError(
                f"model=detector needs sides that are multiples of 8, data gives {height}x{width}"
            )
        if len(channels) != 5:
            raise ConfigError(f"model.channels={list(channels)}: give 5 numbers, one for each block")
        if not num_classes:
            raise ConfigError("model=detector: the data has no classes; type data=weather_shapes")
        self.backbone = Backbone(inputs, channels, groups)
        self.neck = Neck(channels[2], channels[4], groups)
        self.head = nn.Conv2d(channels[4], 1 + num_classes + 4, 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # type: ignore[index]  # few cells hold an object

    def forward(self, x: Tensor) -> Tensor:
        """Numbers of the cells (B, 1 + C + 4, H/4, W/4)."""
        out: Tensor = self.head(self.neck(*self.backbone(x)))
        return out


class Backbone(nn.Module):
    """Five blocks; gives the maps after the third, at stride 4, and the last, at stride 8."""

    def __init__(self, inputs: int, channels: Sequence[int], groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _block(a, b, stride, groups)
            for a, b, stride in zip((inputs, *channels), channels, (2, 2, 1, 2, 1), strict=False)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to (B, channels[2], H/4, W/4) and (B, channels[4], H/8, W/8)."""
        for block in self.blocks[:3]:
            x = block(x)
        fine = x
        for block in self.blocks[3:]:
            x = block(x)
        return fine, x


class Neck(nn.Module):
    """Brings the fine map to the coarse one's channels (1x1), adds that one upsampled, and mixes both (3x3)."""

    def __init__(self, fine: int, coarse: int, groups: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(fine, coarse, 1)
        self.mix = _block(coarse, coarse, 1, groups)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B, coarse, H/4, W/4)."""
        out: Tensor = self.mix(self.lateral(fine) + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        return out


def _block(inputs: int, outputs: int, stride: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        conv_layer(inputs, outputs, 3, stride), norm_layer(outputs, "group", groups), nn.SiLU()
    )
