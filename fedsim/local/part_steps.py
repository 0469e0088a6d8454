"""Further optimisers of one client: each for a part of the parameters, as the networks of a GAN need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.config.schema import AdamConfig, ClientConfig
from fedsim.errors import ClientError, ConfigError, hint
from fedsim.local.groups import matching
from fedsim.local.optimiser import LocalSteps
from fedsim.local.pace import Pace
from fedsim.task.vectors import FlatModel

SETTINGS = (
    "lr",
    "lr_decay",
    "momentum",
    "nesterov",
    "adam",
    "weight_decay",
    "decoupled",
    "groups",
    "schedule",
    "round_schedule",
    "clip_norm",
    "clip",
    "clip_pull",
)
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}  # Kingma, Ba 2015


class PartSteps(LocalSteps):
    """Local steps of a part of the model's parameters: ``steps(w, g)`` moves that part of ``w`` (d,) and nothing else.

    ``job.optimiser("generator.*", lr=2e-4, adam=True)`` makes one, before the first batch of ``job.batches``: patterns
    of names as ``client.groups`` has them, and settings of the group ``client`` that are to be others for it. Moments
    are its own and start at zero; so is the norm that clipping bounds. With ``client.accumulate`` it is to be called
    once for each batch, as the job's other optimisers.
    """

    def __init__(
        self, model: FlatModel, local: ClientConfig, round: int, spans: Sequence[slice], pace: Pace | None
    ):
        super().__init__(local, round, model.layout, pace)
        self._model, self.spans = model, tuple(spans)

    @staticmethod
    def further(
        main: LocalSteps, model: FlatModel, params: str | Iterable[str], settings: Mapping[str, Any]
    ) -> PartSteps:
        """One that goes by the batches of the job's own optimiser ``main``, with some of its settings changed.

        Raises:
            ClientError: for a pattern that matches no parameter, or what is no setting, with the nearest names.
        """
        try:
            names = matching(params, [slot.name for slot in model.layout.params], "job.optimiser: params")
        except ConfigError as error:
            raise ClientError(str(error)) from None
        local = with_settings(main.local, settings)
        if local.schedule is not None and main.pace is None:
            main.pace = Pace()
        return PartSteps(model, local, main.round, model.layout.spans(names), main.pace)

    def __call__(self, w: Tensor, g: Tensor, correction: Tensor | None = None, decay: float = 0.0) -> Tensor:
        """One step of the part, in place, along its entries of ``g`` (and of ``correction``), all (d,)."""
        self.idle = self._model.idle
        self.cut(self.spans)
        part = self._cut_out(w)
        moved = super().__call__(
            part, self._cut_out(g), None if correction is None else self._cut_out(correction), decay
        )
        if len(self.spans) > 1:
            sizes = [s.stop - s.start for s in self.spans]
            for span, new in zip(self.spans, torch.split(moved, sizes), strict=True):
                w[span] = new
        return w

    def _cut_out(self, v: Tensor) -> Tensor:
        """The part's entries of ``v`` (d,): a view where they lie together, else a copy."""
        return v[self.spans[0]] if len(self.spans) == 1 else torch.cat([v[s] for s in self.spans])


def with_settings(local: ClientConfig, settings: Mapping[str, Any]) -> ClientConfig:
    """``local`` with some of the settings of ``client`` changed; ``adam=True`` or a mapping for Adam.

    Raises:
        ClientError: for what is no setting of an optimiser, naming the nearest.
    """
    for name in settings:
        if name not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise ClientError(
                f"job.optimiser: no setting {name!r}{hint(name, SETTINGS)}; there are params, {known}"
            )
    found = dict(settings)
    adam = found.get("adam")
    if adam is False:
        found["adam"] = None
    elif adam is True or isinstance(adam, Mapping):
        own = {} if adam is True else dict(adam)
        known_constants = [f.name for f in fields(AdamConfig)]
        for name in own:
            if name not in known_constants:
                raise ClientError(f"job.optimiser: adam has no {name!r}{hint(str(name), known_constants)}")
        found["adam"] = AdamConfig(**{**ADAM, **own})
    return replace(local, **found)
