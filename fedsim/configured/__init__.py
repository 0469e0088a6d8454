"""From a configuration, and what a caller hands over in Python, to the parts of a run."""

from fedsim.configured.initial import DTYPES, fresh, initialised, model
from fedsim.configured.participants import attack, classes, clock, strategy, system, topology
from fedsim.configured.samples import (
    classes_to_count,
    dataset,
    example,
    given_clients,
    held_out,
    owned,
    split,
)

__all__ = [
    "DTYPES",
    "attack",
    "classes",
    "classes_to_count",
    "clock",
    "dataset",
    "example",
    "fresh",
    "given_clients",
    "held_out",
    "initialised",
    "model",
    "owned",
    "split",
    "strategy",
    "system",
    "topology",
]
