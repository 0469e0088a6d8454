"""What a run leaves of the process that called it: its generators, environment, handlers and hooks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import classification, hashes

from fedsim.engine.ray.driver_state import left_alone

FIRST_USE = """
import random
before = random.getstate()
import fedsim
fedsim.simulate, fedsim.load
print(random.getstate() == before)
"""


def test_importing_draws_nothing_from_the_callers_generator() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_what_joining_ray_changes_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GONE", "1")
    monkeypatch.setenv("SET", "1")
    before, hook, handler = dict(os.environ), sys.excepthook, signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), left_alone({"SET": "2", "NEW": "2"}):
            assert (os.environ["SET"], os.environ["NEW"]) == ("1", "2")
            os.environ |= {"SET": "3", "PYTHONBREAKPOINT": "there"}
            del os.environ["GONE"]
            sys.excepthook = lambda *_: None
            signal.signal(signal.SIGTERM, lambda *_: None)
            raise KeyboardInterrupt
        assert dict(os.environ) == before
        assert sys.excepthook is hook
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
)
def test_modes_of_the_caller_change_nothing_and_are_there_afterwards(mode: Callable[[], Any]) -> None:
    problem = classification("dropout")
    with mode():
        found = hashes(problem.run("rounds=1"))
        after = _modes()
    assert found == hashes(problem.run("rounds=1"))
    with mode():
        assert after == _modes()


def _modes() -> tuple[object, ...]:
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return *modes, torch.get_default_device()
