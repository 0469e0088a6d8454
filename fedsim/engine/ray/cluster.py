"""Starting, joining and stopping Ray. Imports neither torch nor Ray itself until called, so it can run beside them."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from fedsim.errors import EngineError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

INLINE = (
    2 << 20
)  # bytes: smaller results come back with the call, not through the object store (milliseconds each)

_started_here = False
_warming: threading.Thread | None = None
_warm, _left = threading.Event(), threading.Event()
_at_shutdown: set[Callable[[], None]] = set()


def connect(config: Any) -> None:
    """Join the cluster at ``engine.address`` or ``RAY_ADDRESS``, or start a Ray of our own; once per process."""
    import ray

    if _warming is not None and _warming is not threading.current_thread():
        _warm.wait()
    if ray.is_initialized():
        return
    _forget()
    _init(config.address or os.environ.get("RAY_ADDRESS") or "local", config.store_mb)


def share(workers: int, jobs: int, store_mb: int = 0) -> None:
    """Start a Ray for processes that this one starts, found through ``RAY_ADDRESS``: until ``unshare``.

    It has a CPU for each of the ``workers`` of ``jobs`` processes at once (as many as cores if not positive).
    """
    cores = os.cpu_count() or 1
    cpus = max(cores, workers * (jobs if jobs > 0 else cores))
    os.environ["RAY_ADDRESS"] = _init("local", store_mb, num_cpus=cpus)


def unshare() -> None:
    """Stop what ``share`` started."""
    shutdown()
    os.environ.pop("RAY_ADDRESS", None)


def _init(address: str, store_mb: int, **more: Any) -> str:
    """Join the Ray at ``address``, or start one (``local``); its address."""
    import ray

    global _started_here
    own: dict[str, Any] = {}
    if address == "local":
        for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):  # workers keep freed memory
            os.environ.setdefault(name, str(1 << 32))
        os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE))
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other program take the cores
        own = {"include_dashboard": False, **more}
        if store_mb:
            own["object_store_memory"] = store_mb << 20
    for attempt in range(2):
        try:
            context = ray.init(
                address=address,
                namespace=f"fedsim-{os.getpid()}",
                log_to_driver=False,
                logging_level="ERROR",
                **own,
            )
            break
        except Exception as e:
            if attempt or "timed out during startup" not in str(e):
                raise EngineError(f"Ray could not be started or joined at '{address}': {e}") from e
            time.sleep(3)
    if address == "local":
        _started_here = True
        atexit.register(shutdown)
    return str(context.address_info["address"])


def warm_up(config: Any) -> None:
    """Start Ray in the background, beside other imports; errors surface when the engine is built.

    The thread stays until ``shutdown``: Ray's processes are killed when the thread that started them ends.
    """
    global _warming

    def quietly() -> None:
        with contextlib.suppress(Exception):
            connect(config)
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
    global _started_here, _warming
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
        _warming = None
        _warm.clear()
        _left.clear()


def _forget() -> None:
    for call in _at_shutdown:
        call()
    _at_shutdown.clear()
