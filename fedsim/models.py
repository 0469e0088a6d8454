"""Models of the federated-learning literature. Each is a body, ``features(x) -> (B, d)``, and a linear
``head``.

``forward(x) = head(features(x))`` gives logits ``(B, num_classes)``. ``input_shape`` is the shape of one
sample. Weights are drawn from torch's current generator. A shape that a model cannot take raises
``ConfigError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

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
    2NN)."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Output of the last hidden layer ``(B, hidden[-1])``."""
        x = x.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


def xavier(
    input_shape: Sequence[int], num_classes: int, *, model: Callable[[Sequence[int], int], nn.Module]
) -> nn.Module:
    """``model`` with Xavier-uniform weight matrices (Glorot, Bengio 2010) and zero biases in all layers that have both.

    Activations then keep their scale from layer to layer, and so do networks built of it.
    """
    built = model(input_shape, num_classes)
    for layer in built.modules():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)
    return built


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
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, norm: str, groups: int, stem: str
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
