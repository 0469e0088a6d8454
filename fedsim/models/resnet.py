"""The residual network ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.models.base import Model
from fedsim.models.layers import conv_layer, image_shape, norm_layer


class ResNet18(Model):
    """ResNet-18 (He et al. 2016), structure and initialisation as in torchvision, with the norm of one's
    choice.

    Args:
        input_shape: (C, H, W).
        num_classes: C.
        norm: ``group`` (GroupNorm, no running statistics: usual in federated learning since Hsieh et al.
            2020) or ``batch``.
        groups: groups of each GroupNorm; divides 64. Not used with ``batch``.
        stem: ``imagenet`` (7x7 convolution, stride 2, then 3x3 max pooling) or ``cifar`` (3x3, stride 1).
        weights: file of a torchvision ResNet-18 state dict to start from, with ``norm=batch``, ``stem=imagenet``; its
            output layer is taken over if it has as many classes.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        norm: str,
        groups: int,
        stem: str,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        channels, _, _ = image_shape(input_shape, "resnet18", smallest=1)
        if stem not in ("imagenet", "cifar"):
            raise ConfigError(f"model.stem={stem!r}: give 'imagenet' (7x7, stride 2) or 'cifar' (3x3)")
        large = stem == "imagenet"
        self.conv1 = conv_layer(channels, 64, 7 if large else 3, stride=2 if large else 1)
        self.norm1 = norm_layer(64, norm, groups)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        blocks: list[nn.Module] = []
        for inputs, outputs, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
            blocks += [
                _BasicBlock(inputs, outputs, stride, norm, groups),
                _BasicBlock(outputs, outputs, 1, norm, groups),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if weights is not None:
            self._take(weights)

    def _take(self, file: str) -> None:
        """Load torchvision's state dict, whose tensors come in the same order under other names; counters apart."""
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            given = [t for t in state.values() if t.is_floating_point()]
        except Exception as e:
            raise ConfigError(f"model.weights={file}: not a readable state dict ({e})") from e
        own = {k: t for k, t in self.state_dict().items() if t.is_floating_point()}
        if given and len(given[-1]) != len(own["head.bias"]):
            given[-2:] = own["head.weight"], own["head.bias"]
        if [t.shape for t in given] != [t.shape for t in own.values()]:
            raise ConfigError(
                f"model.weights={file}: not a ResNet-18 of torchvision with model.norm=batch, model.stem=imagenet"
            )
        self.load_state_dict(dict(zip(own, given, strict=True)), strict=False)

    def features(self, x: Tensor) -> Tensor:
        """Mean over positions of the last block ``(B, 512)``."""
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        x = self.blocks(x)
        return x.mean(dim=(2, 3))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.conv1 = conv_layer(inputs, outputs, 3, stride)
        self.norm1 = norm_layer(outputs, norm, groups)
        self.conv2 = conv_layer(outputs, outputs, 3, 1)
        self.norm2 = norm_layer(outputs, norm, groups)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(conv_layer(inputs, outputs, 1, stride), norm_layer(outputs, norm, groups))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))
