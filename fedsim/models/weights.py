"""Other draws of the initial weights than torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


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
