"""Which part of a model stays with its client: BatchNorm under federation, and what a method keeps private.

``average``: running statistics are averaged like weights. ``local``: running statistics never leave the client
(SiloBN, Andreux et al. 2020). ``all_local``: neither do the weights of BatchNorm layers (FedBN, Li et al. 2021).
``server``, which only a method can ask for: buffers are the server's, and clients receive them and send none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.exchange.payload import Update
from fedsim.task.layout import Layout
from fedsim.task.vectors import FlatModel

POLICIES = ("average", "local", "all_local")
SERVER = "server"


@dataclass(frozen=True)
class LocalPart:
    """The spans of ``w`` that stay with the client, and whether the buffers do."""

    spans: tuple[slice, ...] = ()
    buffers: bool = False
    places: tuple[Tensor, ...] = ()  # of each span the parameters' entries, without padding: what is kept

    @staticmethod
    def of(policy: str, layout: Layout, private: Iterable[str] = ()) -> LocalPart:
        """The local part under ``policy`` (without BatchNorm layers all are the same) and of the ``private`` parameters
        that the method's clients keep."""
        if policy not in (*POLICIES, SERVER):
            raise ConfigError(f"buffers={policy}: choose one of {', '.join(POLICIES)}")
        norms = layout.batch_norm if policy == "all_local" else frozenset[str]()
        spans = layout.spans(norms) + layout.spans(set(private) - norms)
        real = layout.expand(torch.ones(layout.size, dtype=torch.bool))
        places = tuple(span.start + torch.nonzero(real[span]).flatten() for span in spans)
        return LocalPart(tuple(spans), policy in ("local", "all_local") and layout.buffer_dim > 0, places)

    def overlay(self, model: FlatModel, state: Mapping[str, Tensor]) -> bool:
        """Put the client's own part over the received model; whether parameters changed."""
        if self.buffers and "local/buffers" in state:
            model.buffers.copy_(state["local/buffers"])
        for i, places in enumerate(self.places):
            if f"local/{i}" in state:
                model.w[places] = state[f"local/{i}"]
        return any(k.startswith("local/") and k != "local/buffers" for k in state)

    def keep(self, model: FlatModel, trained: Tensor) -> dict[str, Tensor]:
        """The client's own part after training; ``trained`` (d,) are its final weights."""
        out = {f"local/{i}": trained[places] for i, places in enumerate(self.places)}
        if self.buffers:
            out["local/buffers"] = model.buffers.clone()
        return out

    def zero(self, v: Tensor) -> Tensor:
        """``v`` (..., d), in place, with zeros where parameters stay with the client."""
        for span in self.spans:
            v[..., span] = 0
        return v

    def is_lost(self, update: Update, kept: Mapping[str, Tensor] | None) -> bool:
        """Whether weights that stay with the client would be lost: trained and sent, but not ``kept``."""
        return bool(self.spans) and "delta" in update.arrays and kept is None
