"""What a model remembers beside its vectors. Each client starts without what others left there, and an evaluation
leaves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.task import spectral
from fedsim.task.attributes import Attributes, Content, is_own, of_users, own_layers
from fedsim.task.fixed import BATCH_NORM, frozen_layers
from fedsim.task.habits import Habits
from fedsim.task.mapped import LARGE, clones


class Remembered:
    """Modes, plain attributes, buffers that are not in the flat vector ``buffers``, and power iterations of ``module``,
    which is put into training mode; and what its ``loss`` holds. What it is like now is what it is put back to."""

    def __init__(
        self, module: nn.Module, buffers: Tensor, flat: set[str], habits: Habits, loss: object, reached: bool
    ):
        """``flat``: names of the buffers that ``buffers`` (b,) holds; ``reached``: whether code of the user's that is
        no part of the model may change any layer."""
        self._module = module
        self._frozen = frozen_layers(module)
        self._modes = _modes(module)
        self._train()
        others = [b for n, b in module.named_buffers() if n not in flat]
        merged: list[Tensor] = [p for n, p in module.named_parameters() if n in set(habits.merges)]
        self.small = [b for b in others if b.numel() <= LARGE] + merged  # what is copied back
        self._first = clones(self.small)
        still = _counted(module)
        measured = [
            b for n, b in module.named_buffers() if n not in flat and n not in still and b.numel() <= LARGE
        ]
        self._moving = measured + merged + ([] if flat <= still else [buffers])
        large = [b for b in others if b.numel() > LARGE]
        self._large = [Content(b, held) for b, held in zip(large, clones(large), strict=True)]
        self._norms = spectral.normalised(module)
        self.reached = reached or of_users(module)
        known = [name.rpartition(".")[0] for name in habits.remembers + habits.rebinds]
        self._layers = list(module.modules()) if self.reached else own_layers(module, known)
        self._registered = [*module.modules(), *module.parameters(), *module.buffers()]
        self._things: list[object] = [] if type(loss).__module__.startswith("torch.") else [loss]
        if self.reached:  # weight.seen = ...
            self._things += [vars(p) for p in module.parameters()]
        self._training = self._noted()
        self._evaluating: Attributes | None = None
        self._switches = any(
            type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval for m in self._layers
        )

    @property
    def iterates(self) -> bool:
        """Whether there are vectors that follow from the weights, see ``settle``."""
        return bool(self._norms)

    def restore(self) -> None:
        """All as it was at first."""
        if self.reached and self._modes is not None:
            self._train()
        self._training.restore()
        _copy(self.small, self._first)
        for content in self._large:
            content.restore()

    def settle(self) -> None:
        """Let follow what follows from the weights, now that others are in place."""
        if self._norms:
            spectral.settle(self._norms)

    @contextmanager
    def evaluation(self) -> Iterator[Callable[[], None]]:
        """Evaluation mode, without gradients, as if the model had never been used; then all is as before.

        Gives what is to be called before each batch: none sees what another one left.
        """
        kept = [*self._moving, *(c.tensor for c in self._large if c.changed)]
        before = [t.detach().clone() for t in kept]
        first, used = self._training, None
        if not (first.comparable and first.unchanged()):  # maybe in the middle of training
            used = self._noted()
        first.restore()
        try:
            with torch.no_grad():
                self._mode(False)
                self.settle()
                if self._evaluating is None or self._switches:  # what it does then may depend on the weights
                    self._evaluating = self._noted()
                attributes, start = self._evaluating, [t.detach().clone() for t in kept]

                def again() -> None:
                    attributes.restore()
                    for content in self._large:
                        content.restore()
                    _copy(kept, start)

                yield again
        finally:
            if self._evaluating is not None:
                self._evaluating.restore()
            self._train()
            (used or first).restore()
            for content in self._large:
                content.restore()
            _copy(kept, before)

    def _noted(self) -> Attributes:
        return Attributes(self._layers, self._registered, self._things)

    def _train(self) -> None:
        self._mode(True)
        for layer in self._frozen:
            layer.training = False

    def _mode(self, training: bool) -> None:
        """As ``train`` and ``eval`` do it; layer by layer where no layer has a way of its own, which costs less."""
        if self._modes is None:
            self._module.train(training)
        else:
            for held in self._modes:
                held["training"] = training


def _modes(module: nn.Module) -> list[dict[str, Any]] | None:
    """The attributes of all layers of ``module``, if ``train`` does no more than to note the mode among them."""
    layers = list(module.modules())
    plain = all(
        type(m).train is nn.Module.train
        and type(m).eval is nn.Module.eval
        and type(m).__setattr__ is nn.Module.__setattr__
        and not {"train", "eval"} & vars(m).keys()
        for m in layers
    )
    return [vars(m) for m in layers] if plain else None


def _counted(module: nn.Module) -> set[str]:
    """Names of BatchNorm's buffers: only training changes them."""
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, BATCH_NORM) and not is_own(m)]
    return {f"{n}.{name}".lstrip(".") for n, m in norms for name in m._buffers}


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    if to:
        with torch.no_grad():
            torch._foreach_copy_(to, values)
