"""Parameters and buffers that must lie in the flat vectors, and layers that put other tensors in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsim.data.trees import tree_map
from fedsim.errors import ClientError
from fedsim.task.attributes import is_common, own_layers
from fedsim.task.fixed import places
from fedsim.task.habits import Habits
from fedsim.task.layout import Layout
from fedsim.task.mapped import LARGE, clones, place_of


class Installed:
    """The tensors of ``model`` as views of its vectors.

    Some layers assign to ``self.weight.data``, or to a buffer, in their forward pass. Where that is known (``habits``;
    the float buffers of layers that are not torch's own are always looked at), what they assigned goes into the vector
    and the tensor back into its place, after each pass. Elsewhere it is found out at the end of a job and refused.
    ``common``: no layer does such a thing.
    """

    def __init__(self, model: nn.Module, layout: Layout, vector: Tensor, habits: Habits):
        """Puts the buffers into ``vector`` (b,); parameters follow with ``settle``."""
        self.writes, named = frozenset(habits.writes), dict(model.named_parameters())
        self._names, self._frozen = [slot.name for slot in layout.params], list[tuple[str, nn.Parameter]]()
        for name, p in named.items():
            if not p.requires_grad and name not in habits.merges:
                self._frozen.append((name, p))
        held = [p for _, p in self._frozen if p.numel() <= LARGE or place_of(p) is not None]
        self._values = dict(zip(map(id, held), clones(held), strict=True))  # of frozen parameters, by id
        self._owners = [
            (m._parameters, local, p, f"{name}.{local}".lstrip("."))
            for name, m in model.named_modules()
            for local, p in m._parameters.items()
            if p is not None and p.requires_grad
        ]
        self.common = not self._frozen and all(map(is_common, model.modules()))
        own, where, buffers = set(map(id, own_layers(model))), places(model), dict(model.named_buffers())
        self._homes: list[tuple[dict[str, Any], str, Tensor, str]] = []  # of flat buffers
        self._watched: list[tuple[dict[str, Any], str, Tensor]] = []
        self._spans: list[tuple[Tensor, Tensor]] = []  # each flat buffer, and its place in ``vector``
        for slot in layout.buffers:
            span = vector[slot.span].view(slot.shape).copy_(buffers[slot.name])
            view = (
                span.data
            )  # counts its changes by itself: a write to one is none to another that autograd holds
            self._spans.append((view, span))
            for layer, name in where[id(buffers[slot.name])]:
                layer._buffers[name] = view
                self._homes.append((layer._buffers, name, view, slot.name))
                if id(layer) in own or slot.name in habits.rebinds:
                    self._watched.append((layer._buffers, name, view))
        self._homed = [view.data_ptr() for view, _ in self._spans]
        watched = [held for held, _, _ in self._watched]
        found = [held for held, *_ in (*self._owners, *self._homes) if not any(held is w for w in watched)]
        self._dicts = list({id(held): held for held in found}.values())
        self._contents = [t for held in self._dicts for t in held.values()]

    def settle(self, params: list[nn.Parameter]) -> None:
        """Where parameters lie now is where they are to lie."""
        self._params = params
        self._pointers = [p.data_ptr() for p in params]
        self._written = [(p, p.data) for n, p in zip(self._names, params, strict=True) if n in self.writes]
        self._versions = [(p._version, p.data_ptr()) for _, p in self._frozen]
        self.moves = bool(self._written or self._watched)

    def reinstall(self, bound: Tensor | None, home: Tensor) -> Tensor | None:
        """After a forward pass at the vector ``bound``: what was put into other places goes into the vectors.

        Returns what the parameters are views of from now on: nothing known, if they were moved away from elsewhere.
        """
        if self._watched:
            self._take_back()
        if self._written and bound is not home:
            return None
        for p, view in self._written:
            if p.data_ptr() != view.data_ptr():
                view.copy_(p.data)
                p.data = view
        return bound

    def put_back(self) -> None:
        """Every parameter and buffer in its place again, and trained."""
        for p in self._params:
            p.requires_grad_(True)
        for held, name, tensor, _ in (*self._owners, *self._homes):
            held[name] = tensor
        for view, span in self._spans:
            view.data = span
        for (_, p), seen in zip(self._frozen, self._versions, strict=True):
            if (p._version, p.data_ptr()) != seen and id(p) in self._values:
                p.data = clones([self._values[id(p)]])[0]
        self._versions = [(p._version, p.data_ptr()) for _, p in self._frozen]

    def check(self) -> None:
        """Find what was put into other places unexpectedly, or written to although frozen; see ``FlatModel.check``."""
        if [p.data_ptr() for p in self._params] != self._pointers:
            known = zip(self._names, self._params, self._pointers, strict=True)
            raise ClientError(moved(next(n for n, p, at in known if p.data_ptr() != at)))
        if False in [p.requires_grad for p in self._params]:
            name = next(n for n, p in zip(self._names, self._params, strict=True) if not p.requires_grad)
            raise ClientError(
                f"model: '{name}' was frozen while the model computed (requires_grad_(False)), and would stay so for "
                "other clients of this worker; freeze it before handing the model over, or detach its output"
            )
        if not self._in_place():
            for held, name, p, full in self._owners:
                if held.get(name) is not p:
                    raise ClientError(moved(full))
            for held, name, view, full in self._homes:
                if held.get(name) is not view:
                    raise ClientError(_replaced(full))
        if self._moved():
            away = {id(view) for view, span in self._spans if view.data_ptr() != span.data_ptr()}
            raise ClientError(_replaced(next(full for _, _, view, full in self._homes if id(view) in away)))
        if [(p._version, p.data_ptr()) for _, p in self._frozen] != self._versions:
            pairs = zip(self._frozen, self._versions, strict=True)
            name = next(n for (n, p), seen in pairs if (p._version, p.data_ptr()) != seen)
            raise ClientError(written_frozen(name))

    def _take_back(self) -> None:
        """Buffers that were replaced, or pointed at other memory (``self.mean.data = ...``), into the vector."""
        others = [(held, name, view) for held, name, view in self._watched if held[name] is not view]
        moved = [] if not self._moved() else [(v, s) for v, s in self._spans if v.data_ptr() != s.data_ptr()]
        with torch.no_grad():
            values = [held[name].clone() for held, name, _ in others]  # of one another, if they were swapped
            for (view, span), value in zip(moved, [v.detach().clone() for v, _ in moved], strict=True):
                view.data = span.copy_(value)
            for (held, name, view), value in zip(others, values, strict=True):
                view.copy_(value)
                held[name] = view

    def _moved(self) -> bool:
        """Whether a flat buffer was pointed at other memory."""
        return [view.data_ptr() for view, _ in self._spans] != self._homed

    def _in_place(self) -> bool:
        """Whether layers hold the very tensors that they held."""
        now: list[Any] = []
        for held in self._dicts:
            now += held.values()
        try:
            return now == self._contents
        except Exception:  # tensors have no plain answer to ==, so one was replaced
            return False


def moved(name: str) -> str:
    """Why a parameter may not be pointed at another tensor."""
    layer, _, own = name.rpartition(".")
    return (
        f"model: '{name}' was pointed at another tensor while the model computed (self.{own}.data = ... in a forward "
        f"pass{f' of {layer!r}' if layer else ''}?); change it in place: `with torch.no_grad(): self.{own}.copy_(...)`"
    )


def _replaced(name: str) -> str:
    own = name.rpartition(".")[2]
    return (
        f"model: another tensor took the place of the buffer '{name}' while the model computed; change it in place: "
        f"`self.{own}.copy_(...)`"
    )


def written_frozen(name: str) -> str:
    """Why a frozen parameter may not be written to."""
    own = name.rpartition(".")[2]
    return (
        f"model: the frozen parameter '{name}' was written to while the model computed, but frozen parameters stay as "
        f"they were handed over; make it a buffer, which is averaged: self.register_buffer('{own}', ...)"
    )


def on_copies(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """A forward pass that writes to its inputs is given copies (a hook of such models)."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))
