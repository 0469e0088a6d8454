"""Starting, joining and stopping Ray. Imports neither torch nor Ray itself until called, so it can run beside them."""

from __future__ import annotations

import atexit
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsim.engine.cores import available_cores, check_number
from fedsim.engine.ray import head
from fedsim.engine.ray.driver_state import left_alone
from fedsim.errors import ConfigError, EngineError, shadow

INLINE = (
    2 << 20
)  # bytes: smaller results come back with the call, not through the object store (milliseconds each)
ASKED = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # of any Ray
OF_OWN = {
    "RAY_max_direct_call_object_size": str(INLINE),
    "RAY_worker_niceness": "0",  # Ray's 15 lets any other program take the cores
}
JOIN = 25  # seconds that a running cluster has to let us in; Ray itself waits for minutes, or without end

_head: OwnRay | None = None  # of the Ray that this process has started
_at_shutdown: set[Callable[[], None]] = set()
_passed_on: dict[str, str] = {}  # what ``share`` says to other processes
KEEPING = dict.fromkeys(
    ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(1 << 32)
)  # freed memory stays


class OwnRay:
    """Ray's own processes on this machine, in a session that ends with this process or by ``end``.

    Its start takes seconds, and can be given up at any moment.
    """

    command = (sys.executable, "-P", head.__file__)

    def __init__(self, cpus: int, store_mb: int) -> None:
        self.owner = os.getpid()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [*self.command, str(cpus), str(store_mb << 20)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=KEEPING | ASKED | OF_OWN | os.environ,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._address, self._out = "", self._process.stdout

    @property
    def ready(self) -> bool:
        """Whether ``address`` returns, or raises, at once."""
        return bool(self._address or select.select([self._out], [], [], 0)[0])

    def address(self) -> str:
        """Waits until Ray is up.

        Raises:
            EngineError: if it could not be started, with what it said.
        """
        while not self._address:
            line = self._out.readline().decode()
            if not line:
                self._said.seek(0)
                said = self._said.read().decode(errors="replace").strip().splitlines() or ["it says nothing"]
                raise EngineError(f"Ray could not be started: {said[-1]}")
            self._address = line.partition(head.ADDRESS)[2].strip()
        return self._address

    def end(self) -> None:
        """Kill all processes, up or not."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._out, self._said):
            if pipe is not None:
                pipe.close()


def connect(config: Any) -> None:
    """Join the cluster at ``engine.address`` or ``RAY_ADDRESS``, or start a Ray of our own; once per process.

    Raises:
        ConfigError: if the working directory holds what would hide a package of fedsim from the workers.
        EngineError: if it can't be started, or no cluster answers at the address.
    """
    if (hidden := shadow(Path.cwd())) is not None:  # workers look there first
        raise ConfigError(hidden)
    with left_alone(ASKED if _elsewhere(config) else ASKED | OF_OWN):
        _connect(config)


def _connect(config: Any) -> None:
    import ray

    if ray.is_initialized():
        return
    _forget()
    if address := _elsewhere(config):
        _join(address, "engine.address" if config.address else "RAY_ADDRESS")
        return
    try:
        _init(_started(config.store_mb).address())
    except EngineError:
        shutdown()
        raise
    except Exception as e:
        shutdown()
        raise EngineError(f"Ray could not be started: {e}") from e


def connected() -> bool:
    """Whether this process takes part in a Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def early(config: Any) -> bool:
    """Whether clients may be computed by forked workers until Ray is up (see ``fedsim.engine.ray.forked``).

    Ray must be one of our own that is not up yet; torch's threads and a GPU in use do not survive a fork.
    """
    alone = config.early and config.threads == 1 and _startable(config) and not connected()
    return alone and hasattr(os, "memfd_create") and not list(Path("/dev").glob("nvidia[0-9]*"))


def _startable(config: Any) -> bool:
    return not _elsewhere(config)


def _elsewhere(config: Any) -> str | None:
    """The address of the running cluster that is to be joined, if one is named."""
    return config.address or os.environ.get("RAY_ADDRESS")


def starts(config: Any) -> bool:
    """Begin to start Ray, unless that is done; whether ``connect`` need not wait for it."""
    return connected() or _started(config.store_mb).ready


def check_workers(config: Any) -> None:
    """Refuse more workers on this machine than it could hold open, or would ever compute with.

    Raises:
        ConfigError: with the number of cores.
    """
    if _startable(config):
        check_number("engine.workers", config.workers, ", or 0, one for each")


def share(workers: int, jobs: int, store_mb: int = 0) -> None:
    """Start a Ray for processes that this one starts, found through ``RAY_ADDRESS``: until ``unshare``.

    It has a CPU for each of the ``workers`` of ``jobs`` processes at once (as many as cores if not positive).
    """
    cores = available_cores()
    address = _started(store_mb, max(cores, workers * (jobs if jobs > 0 else cores))).address()
    _passed_on.update({"RAY_ADDRESS": address} | {k: v for k, v in OF_OWN.items() if k not in os.environ})
    os.environ.update(_passed_on)


def unshare() -> None:
    """Stop what ``share`` started."""
    shutdown()
    while _passed_on:
        os.environ.pop(_passed_on.popitem()[0], None)


def _started(store_mb: int, cpus: int | None = None) -> OwnRay:
    """The Ray of our own, which may still be starting."""
    global _head
    if _head is None:
        _head = OwnRay(cpus or available_cores(), store_mb)
        atexit.register(shutdown)
    return _head


def _join(address: str, named: str) -> None:
    """Join the cluster at ``address``, the value of ``named``."""
    outcome: list[Exception | None] = []

    def join() -> None:
        try:
            if found := re.fullmatch(r"\[?([^/\]]+)\]?:(\d+)", address):  # Ray would ask again and again
                socket.create_connection((found[1], int(found[2])), timeout=JOIN / 2).close()
            _init(address)
            outcome.append(None)
        except Exception as e:
            outcome.append(e)

    thread = threading.Thread(
        target=join, name="fedsim-join", daemon=True
    )  # left behind if there is no answer
    thread.start()
    thread.join(JOIN)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {JOIN} s")
    if error is not None:
        instead = "unset RAY_ADDRESS" if named == "RAY_ADDRESS" else "set engine.address=null"
        raise EngineError(
            f"{named}={address}: no Ray cluster could be joined there ({error}); "
            f"name one that runs, or {instead} to start a Ray on this machine"
        ) from error


def _init(address: str, **settings: Any) -> Any:
    import ray

    return ray.init(
        address=address,
        namespace=f"fedsim-{os.getpid()}",
        log_to_driver=False,
        logging_level="ERROR",
        **settings,
    )


def warm_up(config: Any) -> None:
    """Start Ray beside other imports, if the run will wait for it; errors surface when it is asked for."""
    if _startable(config) and not early(config):
        _started(config.store_mb)


def ours() -> bool:
    """Whether the Ray in use was started by this process."""
    return _head is not None


def on_shutdown(call: Callable[[], None]) -> None:
    """Have ``call`` made before Ray is left."""
    _at_shutdown.add(call)


def shutdown() -> None:
    """Stop Ray if this process started it, also in the middle of its start; forget what lived there in any case."""
    global _head
    if _head is not None and _head.owner != os.getpid():  # forked
        return
    _forget()
    if _head is None:
        return
    ending, _head = _head, None
    try:
        if connected():
            sys.modules["ray"].shutdown()
    finally:
        ending.end()


def _forget() -> None:
    for call in _at_shutdown:
        call()
    _at_shutdown.clear()
