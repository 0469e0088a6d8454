"""Real SuperLink and SuperNodes for tests: started on free ports, ended with all their children, whatever happens."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from fedsim.flower.processes import Federation

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0  # seconds; a calm machine needs a tenth of it


def marked(folder: Path) -> dict[str, str]:
    """Environment by which ``left_over`` finds a test's processes, and in which nodes look for work often."""
    path = [str(ROOT / "tests/flower/impatient"), str(ROOT), *sys.path]
    return {
        "FEDSIM_TESTS": str(folder),
        "PYTHONPATH": os.pathsep.join(p for p in path if p and "site-packages" not in p),
    }


@contextmanager
def federation(folder: Path, nodes: int, scheme: str = "http", **parts: Any) -> Iterator[Federation]:
    """A link and ``nodes`` nodes, client k's state in ``folder/state-k``."""
    with Federation(folder / "federation", env=marked(folder), **parts) as fed:
        fed.link()
        fed.ready("link", scheme=scheme, limit=LIMIT)
        for k in range(nodes):
            start_node(fed, folder, k)
        yield fed


def start_node(
    fed: Federation, folder: Path, client: int, name: str = "", options: Sequence[str] = (), **config: Any
) -> str:
    """A node for a client; its name."""
    name = name or f"node-{client}"
    settings = {"partition-id": client, "state-dir": str(folder / f"state-{client}"), **config}
    fed.node(name, settings, options)
    return name


def wait(fed: Federation, run: str, folder: Path, limit: float = LIMIT) -> dict[str, Any]:
    """The summary of a run, once it is written; its logs if it failed before."""
    end, asked = time.monotonic() + limit, time.monotonic()
    while time.monotonic() < end:
        if (folder / "summary.json").exists():
            return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]
        if time.monotonic() - asked > 20:
            asked, status = time.monotonic(), fed.status(run)
            assert not status[0].startswith("finished") or (folder / "summary.json").exists(), (
                f"{status}\n{fed.log('link')}"
            )
        time.sleep(0.2)
    raise AssertionError(f"{folder}: not finished within {limit:g} s\n{fed.log('link')}\n{fed.log('node-0')}")


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(folder: Path) -> list[dict[str, Any]]:
    """Rows of nodes.jsonl."""
    path = folder / "nodes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def hashes(folder: Path) -> list[str]:
    """The weights' hash after each round."""
    return [row["weights_hash"] for row in rows(folder)]


def left_over(folder: Path) -> list[str]:
    """Processes that still carry the mark of this test's federation in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("FEDSIM_TESTS") == str(folder)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
