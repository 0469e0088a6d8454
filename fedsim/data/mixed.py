"""A client's samples with and without labels as one walk over both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.data.local import Batch, LocalData
from fedsim.data.sample_roles import NO_LABEL


@dataclass(frozen=True)
class MixedData(LocalData):
    """Samples of which the first ``known`` have class labels; ``y`` of the others is ``NO_LABEL`` in any case."""

    known: int = 0

    def read(self, rows: Tensor, rng: torch.Generator | None = None) -> Batch:
        """Samples at positions ``rows``."""
        x, y = super().read(rows, rng)
        assert isinstance(y, Tensor)
        return Batch(x, y.masked_fill(rows.to(y.device) >= self.known, NO_LABEL))


def mixed(labelled: LocalData, unlabelled: LocalData | None) -> LocalData:
    """``labelled`` and then ``unlabelled`` samples of the same client; by its batches' labels nobody can tell more than
    by theirs: of the others all, where they are told (``data.labelled.withhold=false``), or none."""
    if unlabelled is None or not len(unlabelled):
        return labelled
    index = torch.cat([labelled.index, unlabelled.index])
    labelled_too = getattr(unlabelled.samples, "y", None) is not None
    known = len(index) if labelled_too else len(labelled)
    return MixedData(
        labelled.samples, index, labelled.dtype, labelled.normalize, labelled.augment, known=known
    )
