"""What a model was seen to do beside computing, in a trial before the run (``fedsim.task.admission``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Habits:
    """Names of what a forward pass changes, or leaves out.

    ``writes``: trainable parameters that it overwrites or points elsewhere; ``rebinds``: buffers in whose place it puts
    other tensors; ``merges``: frozen parameters that differ after a change to evaluation mode and back;
    ``remembers``: layers, each with an attribute, that differ after a training step; ``unused``: parameters without
    part in the loss; ``overwrites``: whether it writes to its inputs; ``outside``: what changes outside of layers
    without a part in the loss, of which a warning was given.
    """

    writes: tuple[str, ...] = ()
    rebinds: tuple[str, ...] = ()
    merges: tuple[str, ...] = ()
    remembers: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    overwrites: bool = False
    outside: tuple[str, ...] = ()


UNKNOWN = Habits()
