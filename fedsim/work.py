"""How much local work a client does in a round; known without running it, so that chunks can be cut by work."""

from __future__ import annotations

from fedsim.config import ClientConfig
from fedsim.rng import numpy_rng


def local_epochs(local: ClientConfig, seed: int, round: int, client: int) -> int:
    """Epochs of a client in a round: ``epochs``, or with ``min_epochs`` a uniform draw of ``min_epochs .. epochs``."""
    if local.min_epochs is None:
        return local.epochs
    return int(numpy_rng(seed, "epochs", round, client).integers(local.min_epochs, local.epochs + 1))


def num_steps(local: ClientConfig, n: int, epochs: int, smallest: int = 1) -> int:
    """Local steps K with ``n`` samples: ``steps`` if that is set; a short last batch of an epoch counts as a step,
    unless it has fewer than ``smallest`` samples."""
    per_epoch = batches_per_epoch(n, local.batch_size, smallest)
    return (local.steps if local.steps is not None else epochs * per_epoch) if per_epoch else 0


def batches_per_epoch(n: int, batch_size: int, smallest: int = 1) -> int:
    """Batches of at least ``smallest`` samples in one pass over ``n``."""
    return n // batch_size * (batch_size >= smallest) + (n % batch_size >= smallest)
