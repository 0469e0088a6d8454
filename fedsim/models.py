"""Models of the federated-learning literature. Each is a body, ``features(x) -> (B, d)``, and a linear
``head``.

``forward(x) = head(features(x))`` gives logits ``(B, num_classes)``. ``input_shape`` is the shape of one
sample. Weights are drawn from torch's current generator. A shape that a model cannot take raises
``ConfigError``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError


class Model(nn.Module):
    """A body and a linear head; subclasses set ``head`` and implement ``features``."""

    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Inputs ``(B, *input_shape)`` to features ``(B, d)``, d = ``head.in_features``."""
        raise NotImplementedError(f"{type(self).__name__} must implement features(x) -> (B, d)")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)``."""
        logits: Tensor = self.head(self.features(x))
        return logits


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
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) if batch_norm else nn.Identity() for b in hidden)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Output of the last hidden layer ``(B, hidden[-1])``."""
        x = x.flatten(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return x


class LeNet(Model):
    """LeNet-5 with ReLU and max pooling: 5x5 convolutions of 6 and 16 channels, layers of 120 and 84 units.

    After LeCun et al. 1998, as used in federated benchmarks: 62 006 parameters on 3x32x32 inputs with 10
    classes.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = _image(input_shape, "lenet", smallest=16)
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
        channels, height, width = _image(input_shape, "cnn", smallest=4)
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
        inputs, _, _ = _image(input_shape, "convnet", smallest=2 ** (len(channels) - 1))
        self.convs = nn.ModuleList(_conv(a, b, 3, 1) for a, b in pairwise([inputs, *channels]))
        self.norms = nn.ModuleList(_norm(c, norm, groups) for c in channels)
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
        inputs, height, width = _image(input_shape, "digits_cnn", smallest=16)
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
        channels, _, _ = _image(input_shape, "resnet18", smallest=1)
        if stem not in ("imagenet", "cifar"):
            raise ConfigError(f"model.stem={stem!r}: give 'imagenet' (7x7, stride 2) or 'cifar' (3x3)")
        large = stem == "imagenet"
        self.conv1 = _conv(channels, 64, 7 if large else 3, stride=2 if large else 1)
        self.norm1 = _norm(64, norm, groups)
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
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = _norm(outputs, norm, groups)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.norm2 = _norm(outputs, norm, groups)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(_conv(inputs, outputs, 1, stride), _norm(outputs, norm, groups))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class CharLSTM(Model):
    """Next-character LSTM of McMahan et al. 2017 and LEAF: embedding, stacked LSTM, linear head on the last
    state.

    Args:
        input_shape: (window,), characters per sample; any length works.
        num_classes: size of the vocabulary.
        embedding: width of the character embedding (8 in LEAF).
        hidden: units per LSTM layer (256).
        layers: stacked LSTM layers (2).
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, embedding: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"model=char_lstm reads windows of characters (window,), data gives {tuple(input_shape)}; "
                "type data=shakespeare or another model"
            )
        self.embedding = nn.Embedding(num_classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Codes ``(B, window)`` to the last output of the top layer ``(B, hidden)``."""
        outputs: Tensor = self.lstm(self.embedding(x.long()))[0]
        return outputs[:, -1]


def _image(shape: Sequence[int], name: str, smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ConfigError(
            f"model={name} needs images (C, H, W) of at least {smallest}x{smallest} pixels, data gives "
            f"{tuple(shape)}; type model=mlp"
        )
    channels, height, width = shape
    return channels, height, width


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _norm(channels: int, norm: str, groups: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm != "group":
        raise ConfigError(f"model.norm={norm!r}: give 'group' or 'batch'")
    if groups < 1 or channels % groups:
        raise ConfigError(f"model.groups={groups} does not divide {channels} channels; give 1, 2, 4, ... 64")
    return nn.GroupNorm(groups, channels)
