"""Models of the federated-learning literature. Most are a body, ``features(x) -> (B, d)``, and a linear
``head``; those of sequences, pixels and boxes give more than one vector a sample.

``forward(x) = head(features(x))`` gives logits ``(B, num_classes)``. ``input_shape`` is the shape of one
sample. Weights are drawn from torch's current generator. A shape that a model cannot take raises
``ConfigError``.
"""

from fedsim.models.attention import GPT, ViT
from fedsim.models.base import Model
from fedsim.models.convolutional import CNN, ConvNet, DigitsCNN, LeNet
from fedsim.models.dense import MLP, Linear
from fedsim.models.detector import Detector
from fedsim.models.directions import CosineHead, cosine
from fedsim.models.recurrent import CharLSTM
from fedsim.models.resnet import ResNet18
from fedsim.models.unet import UNet
from fedsim.models.weights import xavier

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "CharLSTM",
    "ConvNet",
    "CosineHead",
    "Detector",
    "DigitsCNN",
    "LeNet",
    "Linear",
    "Model",
    "ResNet18",
    "UNet",
    "ViT",
    "cosine",
    "xavier",
]
