"""Modes of torch that the caller of a run may be in, and that would change what clients compute, or forbid it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def left() -> Iterator[None]:
    """Within the block gradients are recorded, nothing is computed in another precision and tensors are made in main
    memory, whatever the caller asked torch for (``torch.set_grad_enabled(False)``, ``torch.inference_mode()``,
    ``torch.autocast``, ``torch.set_default_device``): worker processes know nothing of it. Afterwards all is as before.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        if (
            torch.get_default_device().type != "cpu"
        ):  # a mode that every call of torch passes: only where it must be
            modes.enter_context(torch.device("cpu"))
        yield
