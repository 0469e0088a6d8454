"""Convolutional networks without shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.models.base import Model
from fedsim.models.layers import conv_layer, image_shape, norm_layer


class LeNet(Model):
    """LeNet-5 with ReLU and max pooling: 5x5 convolutions of 6 and 16 channels, layers of 120 and 84 units.

    After LeCun et al. 1998, as used in federated benchmarks: 62 006 parameters on 3x32x32 inputs with 10
    classes.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape(input_shape, "lenet", smallest=16)
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2), 120)
        self.fc2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Output of the last hidden layer ``(B, 84)``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))


class CNN(Model):
    """The CNN of McMahan et al. 2017: two padded 5x5 convolutions (32, 64), each with 2x2 pooling; 512 units.

    1 663 370 parameters on 1x28x28 inputs with 10 classes, as in the paper.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape(input_shape, "cnn", smallest=4)
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc = nn.Linear(64 * (height // 4) * (width // 4), 512)
        self.head = nn.Linear(512, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Output of the hidden layer ``(B, 512)``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.fc(x.flatten(1)))


class ConvNet(Model):
    """3x3 convolutions, each with norm and ReLU, 2x2 max pooling between them, and the mean over positions.

    Args:
        input_shape: (C, H, W).
        num_classes: C.
        channels: of the convolutions; the last one is the feature size.
        norm: ``batch`` or ``group``.
        groups: groups of each GroupNorm; divides all channels. Not used with ``batch``.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, channels: Sequence[int], norm: str, groups: int
    ) -> None:
        super().__init__()
        inputs, _, _ = image_shape(input_shape, "convnet", smallest=2 ** (len(channels) - 1))
        self.convs = nn.ModuleList(conv_layer(a, b, 3, 1) for a, b in pairwise([inputs, *channels]))
        self.norms = nn.ModuleList(norm_layer(c, norm, groups) for c in channels)
        self.head = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Mean over positions of the last layer ``(B, channels[-1])``."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(F.max_pool2d(x, 2) if i else x)))
        return x.mean(dim=(2, 3))


class DigitsCNN(Model):
    """Digits network of FedBN (Li et al. 2021), as in FRAug: three 5x5 convolutions, two hidden layers, BatchNorm.

    With channels [64, 64, 128] and hidden [2048, 512], on 3x32x32 inputs with 10 classes, 18 151 370 parameters.

    Args:
        input_shape: (C, H, W), at least 16x16.
        num_classes: size of the output.
        channels: of the three convolutions; the first two are followed by 3x3 max pooling, stride 2.
        hidden: units of the two hidden layers; the last is the size of the features.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, channels: Sequence[int], hidden: Sequence[int]
    ) -> None:
        super().__init__()
        inputs, height, width = image_shape(input_shape, "digits_cnn", smallest=16)
        if len(channels) != 3 or len(hidden) != 2:
            raise ConfigError(
                f"model.channels={list(channels)}, model.hidden={list(hidden)}: give 3 and 2 numbers"
            )
        shapes = pairwise((inputs, *channels))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in shapes)
        self.conv_norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        side = [-(-n // 4) for n in (height, width)]
        widths = [channels[2] * side[0] * side[1], *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.layer_norms = nn.ModuleList(nn.BatchNorm1d(c) for c in hidden)
        self.head = nn.Linear(hidden[1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Output of the last hidden layer ``(B, hidden[1])``."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.conv_norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i < 2:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = x.flatten(1)
        for layer, norm in zip(self.layers, self.layer_norms, strict=True):
            x = F.relu(norm(layer(x)))
        return x
