"""Ray's own processes, started by a process of their own: ``python head.py CPUS BYTES``, with standard input a pipe.

It prints ``ADDRESS`` and the address once they are up. From then on it is a shell that waits for the pipe's end and
kills its process group: Ray is there as long as somebody holds the pipe, however that ends, and can be given up at any
moment of its start. What nobody asked for is not started: a reader of workers' logs, an autoscaler, a dashboard's
server, which take 60 MB each.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

ADDRESS = "address:"  # begins the line
AFTERWARDS = ("sh", "-c", "read line; kill -9 0")


def main() -> None:
    """See the module's text."""
    threading.Thread(target=_watch, daemon=True).start()
    cpus, store = (int(word) for word in sys.argv[1:])
    try:
        node = _started(cpus, store)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    print(ADDRESS, node.gcs_address, flush=True)
    os.dup2(
        sys.stderr.fileno(), sys.stdout.fileno()
    )  # whoever reads the address waits for the end of nothing
    os.execvp(AFTERWARDS[0], AFTERWARDS)


def _watch() -> None:
    """End all that was started so far once the pipe ends."""
    while os.read(0, 1 << 10):
        pass
    os.killpg(0, signal.SIGKILL)


def _started(cpus: int, store: int) -> Any:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    given: dict[str, Any] = {"num_cpus": cpus} | dict.fromkeys(
        ("include_dashboard", "include_log_monitor"), False
    )
    given["no_monitor"] = True

    class Bare(Node):  # type: ignore[misc]
        def start_api_server(self, **_: object) -> None:
            """It is started without a dashboard too."""

    if store:
        given["object_store_memory"] = store
    for attempt in range(2):
        try:
            return Bare(RayParams(**given), head=True, shutdown_at_exit=False, spawn_reaper=False)
        except Exception as error:
            if attempt or "timed out during startup" not in str(error):
                raise
            time.sleep(3)
    return None


if __name__ == "__main__":
    main()
