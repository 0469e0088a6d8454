"""Batches of a job as its views show them, each by a key of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from fedsim.data.dataset import Dataset
from fedsim.data.local import Batch
from fedsim.data.views import Traced, View, seen_prepared
from fedsim.errors import ConfigError, hint


class Keyed(Protocol):
    """What a job gives: how far it is, and generators of its own."""

    @property
    def steps(self) -> int:
        """Steps done."""

    def rng(self, purpose: str, *numbers: int) -> torch.Generator:
        """A generator for a purpose."""


class Showing:
    """Counts how often each view was asked for in a step, so that every time is another draw."""

    def __init__(self, views: Mapping[str, View]):
        self.views, self.phase = views, 0
        self._at: tuple[int, int] = (0, 0)  # phase and step
        self._times: dict[str, int] = {}

    def show(self, job: Keyed, data: Dataset, name: str, batch: Batch) -> Batch:
        """``batch`` as the view ``name`` shows it: keyed by (seed, name, round, client, phase, step, times before)."""
        return self._shown(job, data, self._named(name), name, batch)

    def traced(self, job: Keyed, data: Dataset, name: str, batch: Batch) -> tuple[Batch, Traced]:
        """The same, with the view, which knows how it moved the images; targets stay as they are."""
        view = Traced(self._named(name))
        return self._shown(job, data, view, name, batch), view

    def _named(self, name: str) -> View:
        if (view := self.views.get(name)) is None:
            raise ConfigError(
                f"views.{name}: there is no such view{hint(name, self.views)}; type +view@views.{name}=OPTION"
            )
        return view

    def _shown(self, job: Keyed, data: Dataset, view: View, name: str, batch: Batch) -> Batch:
        if (at := (self.phase, job.steps)) != self._at:
            self._at, self._times = at, {}
        times = self._times.get(name, 0)
        self._times[name] = times + 1
        generator = job.rng(f"view/{name}", *at, times)
        return Batch(*seen_prepared(view, *batch, generator, data.normalize, getattr(data.train, "x", None)))
