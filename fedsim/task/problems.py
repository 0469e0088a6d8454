"""Kinds of learning problems (group ``task``): the loss of each, what its targets are, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.models.split import logits_of as logits_of
from fedsim.task.losses import IGNORED, Forward, LossFn, logits_cross_entropy


@dataclass(frozen=True)
class Problem:
    """How a problem is learned and measured.

    ``loss``: ``None``, cross entropy, or what the model works out by itself. ``metrics``: ``None``, accuracy where
    targets are class labels. ``raw``: targets keep their values, instead of becoming class ids. ``count(y)``: units
    that the loss of a batch is the mean of, where those are not its samples. ``derived``: numbers made of others.
    ``pixels``: how many classes targets (N, H, W) are of, and the one that is left out.
    ``targets``: what they must be (``fedsim.data.labels.TargetRules.kind``). ``besides``: accuracy is measured besides
    ``metrics``, where it can be.
    """

    loss: LossFn | None = None
    metrics: Mapping[str, Any] | None = None
    forward: Forward | None = None
    raw: bool = True
    count: Callable[[Any], Any] | None = None
    derived: Mapping[str, Callable[[Mapping[str, Any]], float]] | None = None
    targets: str = ""
    besides: bool = False
    pixels: tuple[int, int] | None = None


def classification(*, label_smoothing: float = 0.0, metrics: Mapping[str, Any] | None = None) -> Problem:
    """One of C classes a sample: cross entropy of logits (B, C), with targets smoothed by ``label_smoothing`` (Szegedy
    et al. 2016, section 7). ``metrics`` are measured besides accuracy."""
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"task.label_smoothing={label_smoothing}: must be in [0, 1)")
    loss = partial(logits_cross_entropy, label_smoothing=label_smoothing) if label_smoothing else None
    return Problem(loss, metrics, raw=False, besides=True)


def multilabel(*, threshold: float = 0.5, metrics: Mapping[str, Any] | None = None) -> Problem:
    """Several of K labels a sample, targets (B, K) of 0 and 1: binary cross entropy of logits (B, K).

    ``f1`` is the micro-averaged F1 over samples and labels, ``accuracy`` the share of single labels that are right,
    where a label counts as given from probability ``threshold`` on.
    """
    if not 0 < threshold < 1:
        raise ConfigError(f"task.threshold={threshold}: must be in (0, 1)")
    cut = math.log(threshold / (1 - threshold))
    own = {"accuracy": partial(_label_hits, cut=cut), "f1": partial(_micro_f1, cut=cut)}
    return Problem(binary_cross_entropy, own | dict(metrics or {}), targets="labels")


def regression(
    *, loss: str = "mse", quantiles: Sequence[float] = (0.5,), metrics: Mapping[str, Any] | None = None
) -> Problem:
    """Numbers, targets (B,) or (B, K); ``mae`` and ``mse`` are measured.

    ``loss``: ``mse``, ``mae``, ``huber`` (delta 1), or ``quantile``, the pinball loss of outputs (B, Q), one for each
    of ``quantiles`` (Koenker, Bassett 1978), whose ``coverage`` of each is measured.
    """
    if loss == "quantile":
        if not quantiles or not all(0 < q < 1 for q in quantiles):
            raise ConfigError(f"task.quantiles={list(quantiles)}: must lie between 0 and 1")
        levels = tuple(float(q) for q in quantiles)
        own: dict[str, Any] = {f"coverage/{q:g}": partial(_covered, at=i) for i, q in enumerate(levels)}
        return Problem(partial(pinball, quantiles=levels), own | dict(metrics or {}), targets="numbers")
    losses: dict[str, Any] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}
    if loss not in losses:
        raise ConfigError(f"task.loss={loss}: must be {', '.join((*losses, 'quantile'))}")
    named = {"mae": partial(_error, F.l1_loss), "mse": partial(_error, F.mse_loss)}
    return Problem(partial(_error, losses[loss]), named | dict(metrics or {}), targets="numbers")


def segmentation(
    *, num_classes: int, ignore_index: int = IGNORED, metrics: Mapping[str, Any] | None = None
) -> Problem:
    """A class for every pixel, whole numbers (B, H, W) of any width: cross entropy of logits (B, C, H, W), without
    pixels of ``ignore_index``. ``accuracy`` of pixels and ``iou``, the mean intersection over union of the classes that
    occur in target or guess over the whole set, are measured."""
    from fedsim.task.overlap import Overlap

    own = {"accuracy": partial(_pixel_hits, ignored=ignore_index), "iou": Overlap(num_classes, ignore_index)}
    return Problem(
        partial(pixel_cross_entropy, num_classes=num_classes, ignored=ignore_index),
        own | dict(metrics or {}),
        count=partial(_counted, ignored=ignore_index),
        pixels=(num_classes, ignore_index),
    )


def language_model(*, shift: bool = True, metrics: Mapping[str, Any] | None = None) -> Problem:
    """The next token, targets (B, T) with -100 where there is none: mean cross entropy over tokens.

    ``shift``: logits at t are compared with the target at t + 1, as ``transformers`` does; false where targets are
    shifted already. Losses and ``perplexity`` are means over all tokens of a set, and clients weigh as they have
    tokens. Inputs that are a dict with ``labels`` need no targets of their own.
    """
    own = {"accuracy": partial(_token_hits, shift=shift)}
    return Problem(
        partial(token_cross_entropy, shift=shift),
        own | dict(metrics or {}),
        count=partial(tokens, shift=shift),
        derived={"perplexity": _perplexity},
    )


def detection(
    *, loss: LossFn, decode: Callable[[Any], Any], metrics: Mapping[str, Any] | None = None
) -> Problem:
    """Boxes, targets ``{"boxes": (B, M, 4), "labels": (B, M)}`` with label -1 where there is none: ``loss`` of the
    model's output, and mAP of what ``decode`` makes of it (``fedsim.task.detection``)."""
    from fedsim.task.detection import mean_average_precision

    return Problem(loss, {**mean_average_precision(decode), **dict(metrics or {})})


def own(
    *, loss: LossFn | None = None, forward: Forward | None = None, metrics: Mapping[str, Any] | None = None
) -> Problem:
    """A loss ``(output, y)`` or ``(model, batch)``, a forward pass and metrics of one's own, each named by
    ``_target_``; without a loss, the one that the model's output holds."""
    return Problem(loss, metrics, forward)


def binary_cross_entropy(output: Any, y: Tensor) -> Tensor:
    """Mean over samples and labels; logits (B, K), y (B, K)."""
    output = logits_of(output)
    _expect("multilabel", "0 and 1 for every label, (n, K), of logits (n, K)", output, y, 0, 1)
    return F.binary_cross_entropy_with_logits(output, y.to(output.dtype))


def pinball(output: Any, y: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Mean over samples and quantiles of max(q e, (q - 1) e) with e = y - output; output (B, Q), y (B,) or (B, 1)."""
    output = logits_of(output)
    q = output.new_tensor(quantiles)
    if output.shape[-1] != len(q):
        raise ConfigError(f"task.quantiles: {len(q)} of them, but the model has {output.shape[-1]} outputs")
    error = y.reshape(-1, 1) - output
    return torch.maximum(q * error, (q - 1) * error).mean()


def pixel_cross_entropy(output: Any, y: Tensor, *, num_classes: int, ignored: int) -> Tensor:
    """Mean over pixels but those that are ``ignored``; logits (B, C, H, W), y (B, H, W). No pixel left gives zero.

    Raises:
        ConfigError: if the model gives another number of classes, or a pixel is of none of them.
    """
    logits = logits_of(output)
    _expect("segmentation", "a class for every pixel, (n, H, W), of logits (n, C, H, W)", logits, y, 1, 3)
    if logits.shape[1] != num_classes:
        raise ConfigError(
            f"task.num_classes={num_classes}: but the model gives {logits.shape[1]} logits for each pixel; change one "
            "of them"
        )
    try:
        mean = F.cross_entropy(logits, y.long(), ignore_index=ignored)
        return torch.where(_counted(y, ignored=ignored) > 0, mean, mean.new_zeros(()))
    except IndexError:
        odd = [c for c in torch.unique(y).tolist() if c != ignored and not 0 <= c < num_classes]
        raise ConfigError(
            f"task: a pixel has the class {odd[0]}, of task.num_classes={num_classes}; type task.ignore_index={odd[0]} "
            "if such pixels are to be left out"
        ) from None


def _expect(task: str, wanted: str, output: Any, y: Any, more: int | None, least: int) -> None:
    """Refuse what is no pair of tensors of which the output has ``more`` dimensions, and targets have ``least``."""
    if isinstance(output, Tensor) and isinstance(y, Tensor):
        if y.dim() >= least and (more is None or output.dim() == y.dim() + more):
            return
        shown = f"{tuple(y.shape)} of outputs {tuple(output.shape)}"
    else:
        shown = " of outputs ".join(
            str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in (y, output)
        )
    raise ConfigError(f"task={task}: takes {wanted}, not {shown}; another task, model or data")


def token_cross_entropy(output: Any, y: Tensor, *, shift: bool = True) -> Tensor:
    """Mean over the tokens that have a target; logits (B, T, V), y (B, T). Nothing to predict gives zero."""
    logits, y = _of_tokens(output, y, shift)
    total = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (y != IGNORED).sum().clamp(min=1)


def _of_tokens(output: Any, y: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and the targets (B, T) that they predict; virtual tokens before a text (prompt tuning) have
    none."""
    logits = logits_of(output)
    _expect("language_model", "a token at every place, (n, T), of logits (n, T, V)", logits, y, 1, 2)
    y = y.long()
    logits = logits[:, -y.shape[1] :]
    return (logits[:, :-1], y[:, 1:]) if shift else (logits, y)


def tokens(y: Tensor, *, shift: bool = True) -> Tensor:
    """How many tokens of y (B, T) are to be predicted."""
    return ((y[:, 1:] if shift else y).long() != IGNORED).sum()


def tokens_of(output: Any, y: Any) -> Callable[[Any], Any] | None:
    """What the loss that a model gave for targets ``y`` (B, T) is the mean of: its tokens, shifted or not, found by
    computing both; ``None`` where it is neither."""
    z = logits_of(output)
    if not (isinstance(z, Tensor) and isinstance(y, Tensor)) or z.dim() != 3 or y.dim() != 2:
        return None
    if z.shape[1] < y.shape[1]:
        return None
    for shift in (True, False):
        if math.isclose(float(output.loss), float(token_cross_entropy(z, y, shift=shift)), rel_tol=1e-4):
            return partial(tokens, shift=shift)
    return None


def _perplexity(found: Mapping[str, Any]) -> float:
    try:
        return math.exp(found["loss"])
    except OverflowError:
        return math.inf


def _token_hits(output: Any, y: Tensor, *, shift: bool) -> tuple[float, float]:
    logits, y = _of_tokens(output, y, shift)
    kept = y != IGNORED
    return float(((logits.argmax(-1) == y) & kept).sum()), float(kept.sum())


def _pixel_hits(output: Tensor, y: Tensor, *, ignored: int) -> tuple[float, float]:
    kept = y.long() != ignored  # of bytes, -100 would be 156
    return float(((output.argmax(1) == y) & kept).sum()), float(kept.sum())


def _counted(y: Tensor, *, ignored: int) -> Tensor:
    return (y.long() != ignored).sum()


def _label_hits(output: Any, y: Tensor, *, cut: float) -> tuple[float, int]:
    return float(((logits_of(output) > cut) == (y > 0.5)).sum()), y.numel()


def _micro_f1(output: Any, y: Tensor, *, cut: float) -> tuple[float, float]:
    """2 TP / (2 TP + FP + FN)."""
    guess, there = logits_of(output) > cut, y > 0.5
    return 2 * float((guess & there).sum()), float(guess.sum() + there.sum())


def _error(loss: Callable[[Tensor, Tensor], Tensor], output: Any, y: Tensor) -> Tensor:
    """Of outputs (B, 1) as of (B,)."""
    output = logits_of(output)
    _expect("regression", "numbers, (n,) or (n, K), of as many outputs", output, y, None, 1)
    if output.dim() == y.dim() + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    if output.shape != y.shape:
        raise ConfigError(
            f"task=regression: the model gives {tuple(output.shape)} for targets of shape {tuple(y.shape)}; change its "
            "outputs (with a loss of your own that takes them as they are, leave out task=regression, which measures "
            "mae and mse)"
        )
    return loss(output, y.to(output.dtype))


def _covered(output: Any, y: Tensor, *, at: int) -> tuple[float, int]:
    return float((y.reshape(-1) <= logits_of(output)[:, at]).sum()), y.numel()
