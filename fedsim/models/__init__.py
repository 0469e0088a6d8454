"""Models of the federated-learning literature. Each is a body, ``features(x) -> (B, d)``, and a linear
``head``.

``forward(x) = head(features(x))`` gives logits ``(B, num_classes)``. ``input_shape`` is the shape of one
sample. Weights are drawn from torch's current generator. A shape that a model cannot take raises
``ConfigError``.
"""

from fedsim.models.base import Model
from fedsim.models.convolutional import CNN, ConvNet, DigitsCNN, LeNet
from fedsim.models.dense import MLP, Linear
from fedsim.models.recurrent import CharLSTM
from fedsim.models.resnet import ResNet18
from fedsim.models.weights import xavier

__all__ = [
    "CNN",
    "MLP",
    "CharLSTM",
    "ConvNet",
    "DigitsCNN",
    "LeNet",
    "Linear",
    "Model",
    "ResNet18",
    "xavier",
]
