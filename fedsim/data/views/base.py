"""What a view is: a batch transform ``(x, generator) -> x`` that may take targets along, and how one is applied.

A view never changes its input. All its draws come from the generator. Those of this package draw one row of uniform
numbers per sample, in order, so that what a sample becomes depends on the key, its place in the batch and itself, not
on its neighbours nor on how many there are; a view that mixes samples says so. Where several are composed, the second
goes on drawing where the first one stopped, and so depends on the size of the batch.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fedsim.data.dataset import Normalize
from fedsim.data.views.geometry import has_places, moved
from fedsim.errors import ConfigError

View = Callable[[Any, torch.Generator], Any]


@runtime_checkable
class Moving(Protocol):
    """A view that moves pixels, and knows how boxes and maps move with them."""

    def with_targets(self, x: Any, y: Any, generator: torch.Generator) -> tuple[Any, Any]:
        """``x`` and ``y`` as the view shows them; the same ``x`` as without targets."""


@dataclass(frozen=True)
class Joint:
    """A function ``(x, y, generator) -> (x, y)`` of one's own as a view."""

    function: Callable[[Any, Any, torch.Generator], tuple[Any, Any]]

    def __call__(self, x: Any, generator: torch.Generator) -> Any:
        """``x`` alone, where there are no targets: the function gets ``None`` for them."""
        return self.function(x, None, generator)[0]


class TensorView(ABC):
    """A view of one tensor. Of a tree it shows every leaf that it suits, in order, from one generator."""

    wants = "tensors"  # what it suits, in words

    @abstractmethod
    def suits(self, x: Tensor) -> bool:
        """Whether it can show ``x``."""

    @abstractmethod
    def show(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """``x`` (B, ...) as the view shows it, of the same type and shape."""

    def __call__(self, x: Any, generator: torch.Generator) -> Any:
        """``x``, a tensor or a tree of tensors, as the view shows it.

        Raises:
            ConfigError: if it suits nothing in it.
        """
        if isinstance(x, Tensor):
            self.check(x)
            return self.show(x, generator)
        leaves, shape = tree_flatten(x)
        suited = [isinstance(leaf, Tensor) and self.suits(leaf) for leaf in leaves]
        if not any(suited):
            self.check(next((leaf for leaf in leaves if isinstance(leaf, Tensor)), torch.empty(0)))
        shown = [
            self.show(leaf, generator) if good else leaf for leaf, good in zip(leaves, suited, strict=True)
        ]
        return tree_unflatten(shown, shape)

    def check(self, x: Tensor) -> None:
        """Refuse what it does not suit."""
        if not self.suits(x):
            kind = str(x.dtype).removeprefix("torch.")
            raise ConfigError(
                f"view: {type(self).__name__} shows {self.wants}, got {tuple(x.shape)} ({kind}); choose another, e.g. "
                "view@views.strong=noise or mask for tables, tokens for texts, strong for images"
            )


class ImageView(TensorView):
    """A view of images (B, C, H, W), bytes or floats; those that move pixels say in ``moves`` how."""

    wants = "images (B, C, H, W) of bytes or floats"
    visible: float = 0.25  # share of a box that must be left, or it is dropped

    def suits(self, x: Tensor) -> bool:
        """Images of bytes or floats."""
        return is_image(x)

    def moves(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """Images as the view shows them, and the moves (B, 2, 3) by which they came there, first to last."""
        return self.show(x, generator), []

    def with_targets(self, x: Any, y: Any, generator: torch.Generator) -> tuple[Any, Any]:
        """Images with the targets that lie in them; one tensor of images, or a tree with one."""
        leaves, shape = tree_flatten(x)
        images = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and is_image(leaf)]
        if len(images) != 1:
            raise ConfigError(
                f"view: {type(self).__name__} moves targets with one tensor of images, got {len(images)}; "
                "hand over a view of your own, (x, y, generator) -> (x, y)"
            )
        before = leaves[images[0]]
        leaves[images[0]], backs = self.moves(before, generator)
        height, width = before.shape[-2:]
        for back in backs:
            y = moved(y, back, (height, width), self.visible)
        return tree_unflatten(leaves, shape), y


def is_image(x: Tensor) -> bool:
    """Whether ``x`` is a batch of images (B, C, H, W) of bytes or floats."""
    return x.dim() == 4 and (x.dtype == torch.uint8 or x.is_floating_point())


class Unchanged:
    """Everything as it is."""

    def __call__(self, x: Any, generator: torch.Generator) -> Any:
        """Draws nothing."""
        return x


def as_view(thing: Any, key: str) -> View:
    """A view from what was configured or handed over: a callable of ``(x, generator)`` or ``(x, y, generator)``.

    Raises:
        ConfigError: naming ``key``, for anything else.
    """
    if not callable(thing) or isinstance(thing, type):
        shown = thing.__name__ if isinstance(thing, type) else thing
        raise ConfigError(
            f"{key}={shown}: a view is a name of conf/view, or a callable (x, generator) -> x or "
            "(x, y, generator) -> (x, y)"
        )
    try:
        places = [p for p in inspect.signature(thing).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):
        return thing  # type: ignore[no-any-return]
    return Joint(thing) if len(places) == 3 else thing


def seen(view: View, x: Any, y: Any, generator: torch.Generator) -> tuple[Any, Any]:
    """A batch as ``view`` shows it: boxes and maps among the targets move along, others stay."""
    if isinstance(view, Joint):
        return _pair(view, view.function(x, y, generator))
    if (y.__class__ is not Tensor or y.dim() > 2) and _lies_in(x, y) and isinstance(view, Moving):
        return view.with_targets(x, y, generator)
    shown = view(x, generator)
    if shown is None or (y is not None and count(shown) != count(x)):
        raise ConfigError(_returned(view, shown, f"{count(x)} samples, as it was given"))
    return shown, y


def _pair(view: Joint, found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple | list) or len(found) != 2 or found[0] is None:
        raise ConfigError(_returned(view.function, found, "a pair (x, y)"))
    return found[0], found[1]


def count(x: Any) -> int:
    """Samples in a batch; 0 where that cannot be told."""
    if isinstance(x, Tensor):
        return x.shape[0] if x.dim() else 0
    return next((leaf.shape[0] for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _returned(view: Any, found: Any, expected: str) -> str:
    name = getattr(view, "__qualname__", type(view).__name__)
    said = (
        "None"
        if found is None
        else f"{count(found)} samples"
        if isinstance(found, Tensor)
        else repr(type(found))
    )
    forgotten = "; is there a return at its end?" if found is None else ""
    return f"augment or view: {name} returned {said}, expected {expected}{forgotten}"


def seen_prepared(
    view: View, x: Any, y: Any, generator: torch.Generator, normalize: Normalize | None, stored: Any = None
) -> tuple[Any, Any]:
    """The same of a batch that is model input already: views see values times the scale, which lie in [0, 1].

    ``stored``: what the samples are kept as; bytes that are not normalised lie in [0, 255].
    """
    scale = normalize or Normalize(scale=1 / 255, std=(1 / 255,))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return seen(view, x, y, generator)
    if normalize is None and not (isinstance(stored, Tensor) and stored.dtype == torch.uint8):
        return seen(view, x, y, generator)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(shape) for v in (scale.mean, scale.std))
    plain, y = seen(view, x * std + mean, y, generator)
    return (plain - mean) / std, y


@dataclass
class Traced:
    """A view that notes how it moved the images that it showed last: ``moves`` (``fedsim.data.views.geometry``) of each
    sample, none where it moves nothing, and ``None`` where nobody can tell."""

    view: View
    moves: list[Tensor] | None = None

    def __call__(self, x: Any, generator: torch.Generator) -> Any:
        """What the view makes of ``x``."""
        view, self.moves = self.view, None
        usual = isinstance(view, ImageView) and type(view).with_targets is ImageView.with_targets
        if isinstance(view, ImageView) and usual and isinstance(x, Tensor) and is_image(x):
            x, self.moves = view.moves(x, generator)
            return x
        if not isinstance(view, Joint | Moving):
            self.moves = []
        return view(x, generator)

    @property
    def visible(self) -> float:
        """Share of a box that must be left, or it is dropped."""
        return self.view.visible if isinstance(self.view, ImageView) else 0.0


def uniforms(count: int, each: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """A row of ``each`` float64 numbers in [0, 1) per sample: row i depends on the key and i alone."""
    drawn = torch.rand(count, each, generator=generator, device=generator.device, dtype=torch.float64)
    return drawn.to(device)


def normals(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers of the type and place of ``like``; a sample's are those of its place in the batch."""
    drawn = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    drawn = drawn.mul_(2).sub_(1 - 2.0**-53).erfinv_().mul_(2**0.5)
    return drawn.to(like.device, like.dtype)


def _lies_in(x: Any, y: Any) -> bool:
    """Whether targets lie in the images of ``x``."""
    if isinstance(y, Mapping) and "boxes" in y:
        return True
    images = [leaf for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor) and leaf.dim() == 4]
    return any(has_places(y, (image.shape[-2], image.shape[-1])) for image in images)
