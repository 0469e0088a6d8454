"""How a batch goes through a model, and what its loss is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data.local import Batch
from fedsim.data.trees import Tree
from fedsim.errors import ConfigError
from fedsim.models.split import call as call
from fedsim.models.split import logits_of

LossFn = Callable[[Any, Any], Tensor]  # (model output, target), or (model, batch): see ``WholeLoss``
Forward = Callable[[nn.Module, Tree], Any]  # (model, inputs) -> output
IGNORED = -100  # what torch's cross entropy leaves out
MODEL_NAMES = ("model", "module", "net", "network")  # a first parameter of such a name is the model itself


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy; output (B, C), y (B,) int64."""
    return F.cross_entropy(logits_of(output), y)


def own_loss(output: Any, y: Any) -> Tensor:
    """The loss that a model works out by itself, as those of ``transformers`` do where a batch has ``labels``."""
    loss: Tensor = output.loss
    return loss


def logits_cross_entropy(output: Any, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of a model whose output holds ``logits`` (B, C), or of logits that a method made of them."""
    return F.cross_entropy(logits_of(output), y, label_smoothing=label_smoothing)


class WholeLoss:
    """A loss ``(model, batch) -> scalar`` that calls the model itself, e.g. for noise of its own or several passes."""

    def __init__(self, loss: Callable[[nn.Module, Batch], Tensor]):
        self.loss = loss

    def __call__(self, output: Any, y: Any) -> Tensor:
        """Refused: this loss needs the model.

        Raises:
            ConfigError: for methods that put together a loss of a model's output.
        """
        raise ConfigError(
            f"loss: {getattr(self.loss, '__name__', type(self.loss).__name__)}(model, batch) calls the model itself, "
            "but this method needs a loss of the model's output; give loss(output, y), or type strategy=fedavg"
        )

    def of(self, batch: Batch) -> LossFn:
        """The loss of one batch, given the model as output (see ``itself``)."""
        return lambda model, _: self.loss(model, batch)


def itself(module: nn.Module, _: Tree) -> nn.Module:
    """The model as its own output."""
    return module


def takes_model(loss: LossFn) -> bool:
    """Whether the first parameter of a plain function is the model by name; a quick look."""
    code = getattr(loss, "__code__", None)
    return code is not None and code.co_varnames[:1] != () and code.co_varnames[0] in MODEL_NAMES


def stateless(loss: Any) -> bool:
    """Whether ``loss`` surely keeps nothing from batch to batch: a plain function, one with some arguments given, or
    torch's own."""
    if type(loss) is WholeLoss:
        loss = loss.loss
    if isinstance(loss, partial):
        loss = loss.func
    plain = isinstance(loss, FunctionType) and not loss.__closure__
    return plain or isinstance(loss, BuiltinFunctionType) or type(loss).__module__.startswith("torch.")


def is_binary(loss: Any) -> bool:
    """Whether ``loss`` is torch's binary cross entropy, whose targets are 0 and 1."""
    known = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
    return getattr(loss, "func", loss) in known or isinstance(loss, nn.BCELoss | nn.BCEWithLogitsLoss)


def weighed(loss: Any) -> Callable[[Any], float] | None:
    """``(y) -> float``, what torch's cross entropy divides by: how many targets of a batch are not ignored, or the sum
    of their classes' weights.

    ``None`` for other losses, which are means over their batch.
    """
    options: dict[str, Any] = {}
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        options = {"weight": loss.weight, "ignore_index": loss.ignore_index}
    elif isinstance(loss, partial) and loss.func in (F.cross_entropy, F.nll_loss, logits_cross_entropy):
        options = loss.keywords
    elif not any(loss is f for f in (cross_entropy, logits_cross_entropy, F.cross_entropy, F.nll_loss)):
        return None
    return partial(_weight, weight=options.get("weight"), ignored=options.get("ignore_index", IGNORED))


def _weight(y: Any, *, weight: Tensor | None, ignored: int) -> float:
    if y.is_floating_point():  # probabilities (B, C, ...): a mean over samples
        return float(y.numel() / y.shape[1])
    kept = y != ignored
    return float(kept.sum() if weight is None else weight.to(y.device)[y[kept].long()].double().sum())


def admitted_loss(loss: LossFn) -> LossFn:
    """``loss`` as it was given, or a ``WholeLoss`` where its first parameter is the model by name."""
    try:
        first = next(iter(inspect.signature(loss).parameters.values()), None)
    except (TypeError, ValueError):  # of compiled functions
        return loss
    return WholeLoss(loss) if first is not None and first.name in MODEL_NAMES else loss
