"""Starting, joining and stopping Ray. Imports neither torch nor Ray itself until called, so it can run beside them."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsim.engine.cores import available_cores
from fedsim.errors import ConfigError, EngineError, shadow

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

INLINE = (
    2 << 20
)  # bytes: smaller results come back with the call, not through the object store (milliseconds each)

JOIN = 25  # seconds that a running cluster has to let us in; Ray itself waits for minutes, or without end

_started_here = False
_warming: threading.Thread | None = None
_failure: Exception | None = None  # what went wrong in the background, to be raised when Ray is asked for
_warm, _left = threading.Event(), threading.Event()
_at_shutdown: set[Callable[[], None]] = set()


def connect(config: Any) -> None:
    """Join the cluster at ``engine.address`` or ``RAY_ADDRESS``, or start a Ray of our own; once per process.

    Raises:
        ConfigError: if the working directory holds what would hide a package of fedsim from the workers.
        EngineError: if it can't be started, or no cluster answers at the address.
    """
    global _failure
    import ray

    if (hidden := shadow(Path.cwd())) is not None:  # workers look there first
        raise ConfigError(hidden)
    if _warming is not None and _warming is not threading.current_thread():
        _warm.wait()
        if _failure is not None:
            failure, _failure = _failure, None
            raise failure
    if ray.is_initialized():
        return
    _forget()
    if address := config.address or os.environ.get("RAY_ADDRESS"):
        _join(address, "engine.address" if config.address else "RAY_ADDRESS")
    else:
        _start(config.store_mb)


def share(workers: int, jobs: int, store_mb: int = 0) -> None:
    """Start a Ray for processes that this one starts, found through ``RAY_ADDRESS``: until ``unshare``.

    It has a CPU for each of the ``workers`` of ``jobs`` processes at once (as many as cores if not positive).
    """
    cores = available_cores()
    os.environ["RAY_ADDRESS"] = _start(store_mb, max(cores, workers * (jobs if jobs > 0 else cores)))


def unshare() -> None:
    """Stop what ``share`` started."""
    shutdown()
    os.environ.pop("RAY_ADDRESS", None)


def _start(store_mb: int, cpus: int | None = None) -> str:
    """Start a Ray of our own; its address."""
    global _started_here
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):  # workers keep freed memory
        os.environ.setdefault(name, str(1 << 32))
    os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other program take the cores
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": cpus or available_cores()}
    if store_mb:
        own["object_store_memory"] = store_mb << 20
    for attempt in range(2):
        try:
            context = _init("local", **own)
            break
        except Exception as e:
            if attempt or "timed out during startup" not in str(e):
                raise EngineError(f"Ray could not be started: {e}") from e
            time.sleep(3)
    _started_here = True
    atexit.register(shutdown)
    return str(context.address_info["address"])


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

    with _own_sigterm():
        return ray.init(
            address=address,
            namespace=f"fedsim-{os.getpid()}",
            log_to_driver=False,
            logging_level="ERROR",
            **settings,
        )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """A handler of SIGTERM that was there is put back afterwards: Ray sets two, one of Python's and one of C's.

    The system's own call does it, since Python's may be made in the main thread only.
    """
    handler, libc, action = (
        signal.getsignal(signal.SIGTERM),
        ctypes.CDLL(None),
        ctypes.create_string_buffer(256),
    )
    libc.sigaction(signal.SIGTERM, None, action)
    try:
        yield
    finally:
        if callable(handler):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
            libc.sigaction(signal.SIGTERM, action, None)


def warm_up(config: Any) -> None:
    """Start Ray in the background, beside other imports; errors surface when the engine is built.

    The thread stays until ``shutdown``: Ray's processes are killed when the thread that started them ends.
    """
    global _warming

    def quietly() -> None:
        global _failure
        try:
            connect(config)
        except Exception as e:
            _failure = e
        _warm.set()
        _left.wait()

    if _warming is None:
        _warming = threading.Thread(target=quietly, name="fedsim-ray", daemon=True)
        _warming.start()


def ours() -> bool:
    """Whether the Ray in use was started by this process."""
    return _started_here


def on_shutdown(call: Callable[[], None]) -> None:
    """Have ``call`` made before Ray is left."""
    _at_shutdown.add(call)


def shutdown() -> None:
    """Stop Ray if this process started it; forget what lived there in any case."""
    global _started_here, _warming, _failure
    if _warming is not None:
        _warm.wait()
    _forget()
    if _started_here:
        import ray

        if ray.is_initialized():
            ray.shutdown()
    _started_here = False
    if _warming is not None:
        _left.set()
        _warming.join()
        _warming = _failure = None
        _warm.clear()
        _left.clear()


def _forget() -> None:
    for call in _at_shutdown:
        call()
    _at_shutdown.clear()
