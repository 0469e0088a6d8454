"""What leaves a client: one ordered pipeline between its ``finish`` and the server's fold, the same for every method.

    client:  update -> finite? -> clip -> local noise -> + residual -> encode -> fit to C -> residual kept -> ring
    server:  decode -> fold in chunk order -> out of the ring -> central noise -> / denominator -> strategy

``Release.leave`` is the client's half, called by the worker for each update; ``Release.arrive`` is what the server of a
deployment does with what came over the wire, before it folds; ``fedsim.exchange.landing.Landing`` is the server's half,
after the fold. Without a release nothing of this runs.

Where parts plug in:

* a codec (``compression``) is a ``stages.Codec``. It sees one vector at a time, without padding, in float64, and
  makes of it one frame (n,) of uint8. Error feedback, fitting to the clip bound, residuals and bytes are done here.
* secure sums (``secure``) are a ``stages.Ring``: what it makes of a vector is folded in the place of that, as a sum of
  integers, and ``Landing`` takes the sum out of the ring. Masks belong to whoever sends the frame.
* privacy (``privacy``) is ``fedsim.exchange.privacy.Privacy``: clip and local noise here, central noise in ``Landing``,
  or a share of it here, in the fixed point.

A vector is an array of real numbers of the fold that the method does not call a statistic; ``buffers`` are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim.errors import ClientError, EngineError
from fedsim.exchange.codecs.feedback import compensated, remainder
from fedsim.exchange.entries import clip, flat, length_of, shaped, slots_of, spread
from fedsim.exchange.leaving import OWN as OWN
from fedsim.exchange.leaving import Bounds as Bounds
from fedsim.exchange.leaving import Leaving as Leaving
from fedsim.exchange.leaving import Released as Released
from fedsim.exchange.leaving import key_of
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.normals import Draws
from fedsim.exchange.payload import WEIGHT, Value
from fedsim.rng import torch_rng

if TYPE_CHECKING:
    from fedsim.exchange.privacy import Privacy
    from fedsim.exchange.stages import Codec, Ring

# and the task, unless that is ``fit``, and the vector's name: what encoding left out, (size,) without padding
RESIDUAL = f"{OWN}residual/"
CLIP = f"{OWN}clip"  # value of a message: the bound of this exchange, where it changes from round to round
SATURATED = f"{OWN}saturated"  # metric of an update: entries that were beyond reach of the fixed point
FITS = f"{OWN}fits"  # value of an update (below masks an array): 1 where no vector had to be clipped, else 0
EVENTS = f"{OWN}events"  # value of an update: noisy gradients of single samples that it is made of
TOLERANCE = 1e-6  # by which a vector may be longer than the bound, since it is rounded
Kinds = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Release:
    """What is done to an update before it leaves; part of the workers' plan. Knows no method by name."""

    privacy: Privacy | None = None
    compression: Codec | None = None
    secure: Ring | None = None
    statistics: frozenset[str] = frozenset()  # arrays of the method that are no vectors
    public: frozenset[str] = frozenset()  # values of updates that say nothing of a client's samples
    counted: frozenset[str] = frozenset()  # arrays of whole numbers: in fixed point without a scale

    def vectors(self, kinds: Kinds, task: str) -> list[str]:
        """Names of what passes the pipeline in an exchange; nothing of what only measures."""
        if is_measuring(task):
            return []
        others = {"buffers", WEIGHT, FITS, *self.statistics}
        return [n for n, k in kinds.items() if n not in others and "cat" not in k]

    def summed(self, kinds: Kinds, task: str) -> list[str]:
        """Names of what is summed in fixed point, if anything is: vectors, and what nobody may see of a client."""
        return [*self.vectors(kinds, task), *(n for n in (WEIGHT, FITS) if n in kinds)]

    def masks_bits(self, kinds: Kinds, task: str) -> bool:
        """Whether the bits that say which updates fitted the clip bound are masked: only their sum is seen."""
        noisy = self.privacy is not None and self.privacy.central and not self.privacy.distributed
        masked = self.secure is not None and self.secure.masks
        return noisy and masked and bool(self.vectors(kinds, task))

    def kinds(self, kinds: Kinds, task: str) -> dict[str, tuple[str, ...]]:
        """What is asked of the workers: plain sums where noise is added to the sum, or the sum is of integers."""
        summed = self.secure is not None or (self.privacy is not None and self.privacy.central)
        names = self.vectors(kinds, task) if summed else []
        return {n: ("sum",) if n in names else tuple(k) for n, k in kinds.items()}

    def bound(self, vector: str, values: Mapping[str, Value]) -> float | None:
        """How long the vector may be; None: as long as it is."""
        return None if self.privacy is None else self.privacy.bound(vector, values.get(CLIP))

    def bounds(self, kinds: Kinds, task: str, values: Mapping[str, Value]) -> Bounds:
        """What passes the pipeline in an exchange whose message says ``values``, and how long it may be."""
        return {n: self.bound(n, values) for n in self.vectors(kinds, task)}

    def leave(
        self, arrays: Mapping[str, Tensor], values: Mapping[str, Value], kinds: Kinds, about: Leaving
    ) -> Released:
        """Send an update of finite numbers through the stages, one vector after the other.

        Raises:
            ClientError: for what privacy does not cover: other arrays or values, a ``weight`` other than 1.
        """
        sent = Released(dict(arrays))
        bounds = self.bounds(kinds, about.task, about.values) if about.bounds is None else about.bounds
        if self.privacy is not None and not is_measuring(about.task):
            self.privacy.check_update(arrays, bounds, values, self.public)
        fits, weight = True, float(values.get("weight", 1.0))  # type: ignore[arg-type]
        for name, bound in bounds.items():
            v = arrays.get(name)
            if self.secure is not None and v is not None and name in self.counted:
                sent.arrays[name] = self.secure.count(name, v)
                sent.frames[name] = self.secure.frame(sent.arrays[name].flatten())
                continue
            if v is not None and self.secure is not None and not v.is_floating_point():
                raise ClientError(f"'{name}' holds {v.dtype}: secure sums are of real numbers")
            if v is None or not v.is_floating_point() or not v.numel():
                continue
            if bound is not None:
                v, factor = clip(v, bound, about.lengths.get(name), inplace=name == about.spare)
                fits = fits and factor == 1.0
            sent.arrays[name] = v
            if self._encodes:
                self._encoded(name, v, bound, about, sent, len(bounds), weight)
        if WEIGHT in kinds and self.secure is not None:
            share = self.secure.share(weight, about.values)
            sent.arrays[WEIGHT], sent.frames[WEIGHT] = share, self.secure.frame(share)
        if FITS in kinds and self.secure is not None:
            sent.arrays[FITS] = bit = self.secure.bit(fits)
            sent.frames[FITS] = self.secure.frame(bit)
        elif self.privacy is not None and self.privacy.central and bounds and not self.privacy.distributed:
            sent.values[FITS] = float(fits)
        if about.events:
            sent.values[EVENTS] = about.events
        return sent

    @property
    def hides(self) -> bool:
        """Whether there is noise, or there are masks."""
        return self.privacy is not None or (self.secure is not None and self.secure.masks)

    @property
    def _noisy(self) -> bool:
        return self.privacy is not None and self.privacy.local

    @cached_property
    def _encodes(self) -> bool:
        return self.compression is not None or self.secure is not None or self._noisy

    def _encoded(
        self,
        name: str,
        v: Tensor,
        bound: float | None,
        about: Leaving,
        sent: Released,
        count: int,
        weight: float,
    ) -> None:
        """The stages after the clip, on one of ``count`` vectors, without padding and in float64."""
        slots, draws, codec = slots_of(v, about.layout), about.draws(name), self.compression
        x = flat(v, slots).double().cpu()
        if self.privacy is not None and self.privacy.local:
            x = x + self._own_noise(x, v, bound, about, count, draws)
        turned = self.turned(name, len(x))
        if codec is not None and codec.takes(name) and not turned:
            layout = about.layout if slots is about.layout.params else None
            kept = f"{RESIDUAL}{'' if about.task == 'fit' else f'{about.task}/'}{name}"  # each exchange's own
            residual = about.kept.get(kept)
            if codec.feedback and residual is not None:
                x = compensated(x, residual.flatten().cpu())
            coded = self.common(name, about.seed, about.task, about.round) if codec.shared else draws
            frame = codec.encode(x, coded, layout)
            y = codec.decode(frame, coded, layout)
            if bound is not None and not self._noisy and (length := length_of(y)) > bound * (1 + TOLERANCE):
                frame = codec.shrink(frame, bound / length, layout)
                y = codec.decode(frame, coded, layout)
            if codec.feedback:
                sent.state[kept] = remainder(x, y, codec.feedback_decay).to(v.dtype)
            sent.frames[name], x = frame, y
        if self.secure is not None:
            factor = self.secure.factor(name, weight, about.values)
            places = self.places(name, len(x), about.seed, about.task, about.round)
            deviation = self.spread(bound, count)
            noise = self._own_noise(x, v, bound, about, count, draws) if deviation else None
            part, added = (t if t is None or places is None else t[places] for t in (x, noise))
            if turned and codec is not None:
                alike = self.common(name, about.seed, about.task, about.round)
                part, added = (None if t is None else codec.flat(t, alike) for t in (part, added))
            assert part is not None
            whole, saturated = self.secure.enter(
                name, part, bound, draws, factor, added, deviation, bool(turned)
            )
            sent.frames[name] = self.secure.frame(whole)
            sent.arrays[name] = whole if turned else shaped(spread(whole, places, len(x)), slots, v)
            sent.metrics[SATURATED] = sent.metrics.get(SATURATED, 0.0) + saturated
            return
        sent.arrays[name] = shaped(x.to(v.device, v.dtype), slots, v)

    def _own_noise(
        self, x: Tensor, v: Tensor, bound: float | None, about: Leaving, count: int, draws: Draws
    ) -> Tensor:
        """What a client adds to ``x``, the entries of ``v`` without padding; nothing where entries stay with it."""
        assert self.privacy is not None
        noise = self.privacy.own_noise(x, bound, count, draws)
        keeps = about.private(v, slots_of(v, about.layout))
        return noise if keeps is None else noise * keeps

    def spread(self, bound: float | None, count: int) -> float:
        """Deviation of the noise below the ring that a client adds to one of ``count`` vectors; 0: none."""
        if self.privacy is None or bound is None or not self.privacy.distributed:
            return 0.0
        return self.privacy.own_spread(bound, count)

    @staticmethod
    def common(vector: str, seed: int, task: str, round: int) -> Draws:
        """Generators that all clients of an exchange have in common."""
        key = key_of(task, vector)
        return lambda stage: torch_rng(seed, f"{key}/shared/{stage}", round)

    def places(self, vector: str, d: int, seed: int, task: str, round: int) -> Tensor | None:
        """Which of ``d`` entries are summed in fixed point, (k,), ascending; None: all of them."""
        codec = self.compression
        if self.secure is None or codec is None or not codec.takes(vector) or vector in self.counted:
            return None
        return codec.support(d, self.common(vector, seed, task, round))

    def turned(self, vector: str, d: int) -> int:
        """How many numbers stand for ``d`` entries in secure sums of rotated vectors; 0 where they are not rotated."""
        codec = self.compression
        rotates = (
            self.secure is not None and codec is not None and vector not in (WEIGHT, FITS, *self.counted)
        )
        return codec.flat_size(d) if rotates and codec is not None and codec.takes(vector) else 0

    def landed(
        self, vector: str, total: Tensor, like: Tensor, about: Leaving, bound: float | None, count: int
    ) -> Tensor:
        """The real sum of one of ``count`` vectors, of the shape of ``like``, of its ``total`` in fixed point."""
        assert self.secure is not None
        if vector in self.counted:
            return self.secure.counts(total)
        deviation, codec, slots = self.spread(bound, count), self.compression, slots_of(like, about.layout)
        size = like.numel() if slots is None else slots.size
        if codec is None or not (turned := self.turned(vector, size)):
            return self.secure.leave(vector, total, bound, deviation)
        if turned != len(total):
            raise EngineError(
                f"compression=rotate: the message holds no array of the shape of '{vector}', so its sum cannot be "
                "rotated back; type compression.only=[delta]"
            )
        r = self.secure.leave(vector, total, bound, deviation, flat=True)
        return shaped(
            codec.unflat(r, self.common(vector, about.seed, about.task, about.round), size), slots, like
        )

    def frames(self, vector: str, dtype: torch.dtype) -> bool:
        """Whether a vector of ``dtype`` travels as a frame."""
        takes = self.compression is not None and self.compression.takes(vector)
        if self.secure is not None:
            return dtype.is_floating_point or vector in self.counted
        return dtype.is_floating_point and takes

    def arrive(
        self, travelled: Mapping[str, Tensor], shapes: Mapping[str, Tensor], kinds: Kinds, about: Leaving
    ) -> tuple[dict[str, Tensor], int]:
        """At the server of a deployment: what came over the wire as it is folded, and how many vectors were longer
        than an honest client's and were clipped. ``shapes``: of each vector, one of its shape and type.

        Raises:
            ClientError: for a frame that no encoder makes.
        """
        arrays, codec, long = dict(travelled), self.compression, 0
        for name in self.summed(kinds, about.task):
            v, like = arrays[name], shapes[name]
            if like.numel() and self.frames(name, like.dtype):
                slots = slots_of(like, about.layout)
                size = like.numel() if slots is None else slots.size
                key = (about.seed, about.task, about.round)
                if self.secure is not None:
                    places, turned = self.places(name, size, *key), self.turned(name, size)
                    whole = self.secure.opened(v, turned or (size if places is None else len(places)))
                    v = whole if turned else shaped(spread(whole, places, size), slots, like)
                elif codec is not None:
                    layout = about.layout if slots is about.layout.params else None
                    coded = self.common(name, *key) if codec.shared else about.draws(name)
                    x = codec.decode(v, coded, layout, size)
                    v = shaped(x.to(like.dtype), slots, like)
            bound = None if self.secure is not None or self._noisy else self.bound(name, about.values)
            if bound is not None and length_of(v) > bound * (1 + TOLERANCE):
                v, long = clip(v, bound)[0], long + 1
            arrays[name] = v
        return arrays, long
