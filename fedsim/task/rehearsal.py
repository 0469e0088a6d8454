"""One training step and one evaluation of two samples on a copy of the model, before anything starts: what it does."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.data.local import Batch
from fedsim.data.local import copied as copied_batch
from fedsim.data.trees import Tree, leaves
from fedsim.errors import ConfigError
from fedsim.task.attributes import Attributes
from fedsim.task.copies import copied, values_of
from fedsim.task.fixed import converted, frozen_layers
from fedsim.task.habits import UNKNOWN, Habits
from fedsim.task.installed import moved, written_frozen
from fedsim.task.losses import WholeLoss
from fedsim.task.mapped import clones, trim
from fedsim.task.outside import changed, check, code_of, noted
from fedsim.task.task import Task
from fedsim.task.unregistered import unregistered

NAMED = 5  # parameters named in a message
TRIED = 50  # parameters moved one by one, to see whether the loss does


def rehearsed(task: Task, batch: Batch, dtype: torch.dtype) -> Habits:
    """What the model of ``task`` does with ``batch``. Nothing is known of one that cannot train on two samples. Warns
    of parameters that the loss depends on without giving them a gradient.

    Raises:
        ConfigError: for what cannot be trained: it names the layer, and what to do.
    """
    with _randomness_apart(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stage = _Stage(copied(task.model), task, batch, dtype)
        try:
            habits = stage.habits()
            silent = stage.silent(habits.unused)
            kept = stage.kept_elsewhere()
        finally:
            stage.leave()
            trim(task.model)
    for line in filter(None, (kept, stage.strangers)):
        warnings.warn(line, stacklevel=2)
    if silent:
        more = f" and {len(silent) - NAMED} more" if len(silent) > NAMED else ""
        warnings.warn(
            f"model: the loss depends on {', '.join(map(repr, silent[:NAMED]))}{more}, but gives no gradient: not "
            "trained. With torch.utils.checkpoint type use_reentrant=False; else look for .detach() and no_grad, or "
            "set requires_grad=False if that is meant",
            stacklevel=2,
        )
    return replace(habits, outside=stage.outside)


class _Stage:
    """A copy of the model in training mode, and what it was like before."""

    def __init__(self, model: nn.Module, task: Task, batch: Batch, dtype: torch.dtype):
        self.model, self.task, self.batch = converted(model, dtype, "cpu"), task, batch
        self.frozen_layers = frozen_layers(model)
        self._train()
        self.params, self.buffers = dict(model.named_parameters()), dict(model.named_buffers())
        named = {**self.params, **self.buffers}
        self.values = values_of(named, task.model)
        self.places = {n: t.data_ptr() for n, t in named.items()}
        registered = [*model.modules(), *self.params.values(), *self.buffers.values()]
        self.layers = dict(model.named_modules())
        self.own = {n: dict(vars(m)) for n, m in self.layers.items()}
        self.attributes = {n: Attributes([m], registered) for n, m in self.layers.items()}
        self.classes = {
            (kind, name): value
            for m in self.layers.values()
            for kind in type(m).__mro__
            if kind is not object and not kind.__module__.startswith("torch.")
            for name, value in vars(kind).items()
            if not name.startswith("__") and not hasattr(value, "__get__")
        }
        loss = task.loss.loss if isinstance(task.loss, WholeLoss) else task.loss
        cells = map(_content, getattr(loss, "__closure__", None) or ())
        held = [c for c in cells if isinstance(c, list | dict | set)]
        self.shared = Attributes([], registered, [*self.classes.values(), *held, loss])
        self.loss = Attributes([], registered, [loss])
        self.strangers = ""
        self.users = code_of(replace(task, model=model))
        self.outside: tuple[str, ...] = ()

    def habits(self) -> Habits:
        """One step, then evaluation and back."""
        batch = copied_batch(self.batch)
        try:
            value = self.task.value(self.model, batch)
        except Exception:  # any of the user's: two samples may be too few; in the run it is named by client
            return UNKNOWN
        if _written(batch.y, self.batch.y):
            raise ConfigError(
                "loss: writes to the targets of a batch, which methods and metrics read again; work on y.clone()"
            )
        overwrites = _written(batch.x, self.batch.x)
        if overwrites and isinstance(
            self.model, torch.jit.ScriptModule
        ):  # which takes no hook that makes copies
            raise ConfigError(
                "model: writes to its inputs, which methods read again; type inplace=False, or x = x * ..., before "
                "torch.jit.script"
            )
        self._refuse_new()
        writes, rebinds = self._written(), self._rebound()
        remembers = tuple(f"{n}.{a}".lstrip(".") for n in self.layers for a in self._changed(n))
        for name, p in self.params.items():
            if not p.requires_grad and self._differs(name, p):
                raise ConfigError(written_frozen(name))
        unused = self._unused(value)
        self._put_back()
        merges = self._merged()
        writes = tuple(dict.fromkeys((*writes, *self._written())))
        return Habits(writes, rebinds, merges, remembers, unused, overwrites)

    def silent(self, unused: tuple[str, ...]) -> list[str]:
        """Which of the parameters without gradient the loss changes with."""
        if not unused or (here := self._value()) is None or here != self._value():
            return []
        if self._value(unused) == here:
            return []
        return [n for n in unused[:TRIED] if self._value((n,)) != here]

    def kept_elsewhere(self) -> str | None:
        """What to say of code that keeps something where no client's start puts it back, see ``outside.check``."""
        if not self.users:
            return None
        before, first, second = noted(self.users), self._value(), self._value()
        if first is None or second is None:
            return None
        self._put_back()
        after = noted(self.users)
        self.outside = tuple(name for name, digest in after.items() if before.get(name) != digest)
        return check("model or loss", first, second, changed(before, after))

    def leave(self) -> None:
        """Put back what is no copy: variables of the layers' classes, and what the loss holds."""
        for (kind, name), value in self.classes.items():
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)
        self.shared.restore()

    def _value(self, moving: tuple[str, ...] = ()) -> float | None:
        """The loss, with the parameters ``moving`` elsewhere; draws are always the same."""
        self._put_back()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        try:
            with torch.no_grad():
                for name in moving:
                    self.params[name].add_(
                        torch.linspace(0.1, 0.3, self.params[name].numel()).view_as(self.params[name])
                    )
                return float(self.task.value(self.model, copied_batch(self.batch)))
        except Exception:
            return None

    def _put_back(self) -> None:
        for attributes in self.attributes.values():
            attributes.restore()
        self.loss.restore()
        tensors = (*self.params.values(), *self.buffers.values())
        for t, value in zip(tensors, clones(self.values.values()), strict=True):
            t.data = value
        self.places = {n: t.data_ptr() for n, t in (*self.params.items(), *self.buffers.items())}

    def _train(self) -> None:
        self.model.train()
        for layer in self.frozen_layers:
            layer.training = False

    def _differs(self, name: str, t: Tensor) -> bool:
        before = self.values[name]
        return t.shape != before.shape or t.dtype != before.dtype or not torch.equal(t.detach(), before)

    def _refuse_new(self) -> None:
        now = dict(self.model.named_parameters())
        for name in now:
            if name not in self.params:
                layer = name.rpartition(".")[0] or name
                raise ConfigError(
                    f"model: '{layer}' is made in the first forward pass, so its parameters would not be trained; run "
                    "one batch through the model before handing it over: model(x)"
                )
        for name, p in self.params.items():
            if now.get(name) is not p or p.shape != self.values[name].shape:
                raise ConfigError(moved(name))

    def _written(self) -> tuple[str, ...]:
        trained = [(n, p) for n, p in self.params.items() if p.requires_grad]
        return tuple(n for n, p in trained if p.data_ptr() != self.places[n] or self._differs(n, p))

    def _rebound(self) -> tuple[str, ...]:
        out = []
        now = dict(self.model.named_buffers(remove_duplicate=False))
        for name, before in self.buffers.items():
            buffer = now.get(name)
            at = before.data_ptr()
            if buffer is before and at == self.places[name] and buffer.shape == self.values[name].shape:
                continue
            if buffer is None or buffer.shape != self.values[name].shape or buffer.dtype != before.dtype:
                raise ConfigError(
                    f"model: the buffer '{name}' changes its shape or type in a forward pass; let it have its final "
                    f"ones from the start (it is {tuple(self.values[name].shape)}, {before.dtype})"
                )
            out.append(name)
        return tuple(out)

    def _changed(self, layer: str) -> list[str]:
        """Attributes of a layer that are no longer what they were."""
        before, now = self.own[layer], vars(self.layers[layer])
        names = [k for k in now if k not in before or now[k] is not before[k]]
        return names or ([] if self.attributes[layer].same() else ["(what an attribute holds)"])

    def _unused(self, value: Any) -> tuple[str, ...]:
        """Parameters without part in the loss, found by its gradient."""
        trained = {n: p for n, p in self.params.items() if p.requires_grad}
        if not isinstance(value, Tensor) or value.numel() != 1:  # said in the run, by client
            return ()
        if not value.requires_grad:
            raise ConfigError(
                "model: the loss depends on no trainable parameter; look for .detach() and no_grad"
            )
        self.strangers = unregistered(value, self.model)
        try:
            grads = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            advice = (
                "type use_reentrant=False in torch.utils.checkpoint"
                if "use_reentrant" in str(error) or "Checkpointing" in str(error)
                else "does loss.backward() work in a plain loop?"
            )
            raise ConfigError(f"model: its gradient cannot be computed ({said}); {advice}") from error
        for name, g in zip(trained, grads, strict=True):
            if g is not None and g.layout != torch.strided:
                raise ConfigError(
                    f"model: the gradient of '{name}' is sparse; type sparse=False where it is looked up"
                )
        return tuple(n for n, g in zip(trained, grads, strict=True) if g is None)

    def _merged(self) -> tuple[str, ...]:
        """Frozen parameters that come back from evaluation with rounding errors: adapters were merged into them."""
        frozen = {n: p for n, p in self.params.items() if not p.requires_grad}
        self.model.eval()
        try:
            with torch.no_grad():
                self.task.output(self.model, copied_batch(self.batch).x)
        except Exception:
            return ()
        finally:
            self._train()
        changed = [n for n, p in frozen.items() if p.data_ptr() != self.places[n] or self._differs(n, p)]
        for name in changed:
            if not torch.allclose(frozen[name].detach(), self.values[name], rtol=1e-3, atol=1e-5):
                raise ConfigError(written_frozen(name))
        return tuple(changed)


def _written(given: Tree, before: Tree) -> bool:
    """Whether tensors of ``given``, copies of those ``before``, were written to."""
    pairs = [(u, v) for u, v in zip(leaves(given), leaves(before), strict=True) if isinstance(u, Tensor)]
    return any(u._version > 0 or u.shape != v.shape or not torch.equal(u, v) for u, v in pairs)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


@contextmanager
def _randomness_apart() -> Iterator[None]:
    """What is drawn inside is drawn by nobody else's generators."""
    own, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)
