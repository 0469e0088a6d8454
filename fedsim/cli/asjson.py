"""``--json`` of runs: everything else goes to stderr, then what the jobs came to goes to stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from fedsim.cli.sweep import JobResult

SCHEMA = "run.schema.json"  # beside this module


@contextmanager
def aside(on: bool) -> Iterator[None]:
    """Where ``on``, whatever is printed within goes to stderr, by this process and those that it starts."""
    if not on:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)


def document(outcomes: Sequence[JobResult], code: int) -> str:
    """What ``run.schema.json`` says."""
    from fedsim.run.key import version

    content = {"schema": 1, "fedsim": version(), "code": code, "jobs": [_job(o) for o in outcomes]}
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _job(outcome: JobResult) -> dict[str, Any]:
    done = outcome.status in ("done", "skipped")
    return {
        "job": outcome.job,
        "overrides": outcome.overrides,
        "status": outcome.status,
        "folder": outcome.dir or None,
        "reason": outcome.reason if outcome.status == "failed" else None,
        "summary": json.loads((Path(outcome.dir) / "summary.json").read_text("utf-8")) if done else None,
    }
