"""Which exchanges belong to a method, and which only measure: these cost nothing and pass no release."""

from __future__ import annotations

from functools import lru_cache

MEASURING = (
    "evaluate",
    "test",
    "utility",
    "held_out",
    "guess",
)  # tasks that the simulator sets, not the method: no bytes, no time
ELSEWHERE = (
    "val/",
    "train/",
    "attack/",
)  # begin tasks that measure on other samples than tests (``Server.on``)


@lru_cache  # asked of every client's answer
def is_measuring(task: str) -> bool:
    """Whether a task is the simulator's own measuring."""
    return task in MEASURING or task.startswith(ELSEWHERE)
