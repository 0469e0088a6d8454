"""Freed memory stays with the process while it computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from fedsim.engine.allocator import _glibc, keeping

def faults(times=40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(1 << 20)  # 4 MiB: a thousand pages, or more where pages are small
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if _glibc() is None:
    sys.exit(3)
_glibc().mallopt(-3, 128 * 1024)  # as at the start: nothing has moved the threshold yet
usual = faults()
with keeping():
    with keeping():
        faults(2)
    kept = faults()
print(usual, kept, faults())
"""


def run(**environment: str) -> list[int]:
    given = {name: value for name, value in os.environ.items() if name == "PYTHONPATH"} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=given)
    if done.returncode == 3:
        pytest.skip("malloc is not glibc's")
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_pages_are_not_faulted_in_again_within_the_block() -> None:
    usual, kept, after = run()
    assert kept < usual / 4
    assert after < usual / 2, "the caller's own code is not slower afterwards"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_the_environment_says_holds() -> None:
    usual, kept, _ = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept > usual / 2
