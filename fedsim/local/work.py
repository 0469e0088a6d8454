"""How much local work a client does in a round; known without running it, so that chunks can be cut by work."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsim.config.schema import ClientConfig
from fedsim.data.local import batches_per_epoch
from fedsim.rng import numpy_rng


@dataclass(frozen=True)
class Work:
    """Local steps of a client with ``n`` samples, in batches of at most ``batch``."""

    steps: int
    n: int
    batch: int
    short: bool = False  # fewer steps than configured

    @property
    def samples(self) -> int:
        """Samples that the steps see; the last batch of an epoch may be short."""
        if not self.n:
            return 0
        epochs, rest = divmod(self.steps, -(-self.n // self.batch))
        return epochs * self.n + min(rest * self.batch, self.n)

    def only(self, steps: int) -> Work:
        """The first ``steps`` of them."""
        return replace(self, steps=steps, short=True) if steps < self.steps else self


def work_of(local: ClientConfig, n: int, seed: int, round: int, client: int) -> Work:
    """What a client with ``n`` samples is asked to do in a round."""
    return Work(num_steps(local, n, local_epochs(local, seed, round, client)), n, step_size(local))


def local_epochs(local: ClientConfig, seed: int, round: int, client: int) -> int:
    """Epochs of a client in a round: ``epochs``, or with ``min_epochs`` a uniform draw of ``min_epochs .. epochs``."""
    if local.min_epochs is None:
        return local.epochs
    return int(numpy_rng(seed, "epochs", round, client).integers(local.min_epochs, local.epochs + 1))


def step_size(local: ClientConfig) -> int:
    """Samples of a whole step: ``accumulate`` micro-batches of ``batch_size``."""
    return local.batch_size * local.accumulate


def num_steps(local: ClientConfig, n: int, epochs: int, smallest: int = 1) -> int:
    """Local steps K with ``n`` samples: ``steps`` if that is set; a short last step of an epoch counts as one,
    unless it has fewer than ``smallest`` samples."""
    per_epoch = batches_per_epoch(n, step_size(local), smallest) if local.batch_size >= smallest else 0
    return (local.steps if local.steps is not None else epochs * per_epoch) if per_epoch else 0
