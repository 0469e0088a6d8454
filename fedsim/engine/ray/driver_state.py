"""What Ray changes in the process that joins it, put back afterwards: environment, handlers, hooks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def left_alone(wanted: Mapping[str, str]) -> Iterator[None]:
    """Within the block the environment has ``wanted`` where it says nothing else. After it the environment, the hook
    for uncaught errors and the handler of SIGTERM are what they were: Ray sets ``PYTHONBREAKPOINT``, and two handlers,
    one of Python's and one of C's, which the system's own call puts back: Python's may be made in the main thread only.
    """
    variables, hook, handler = dict(os.environ), sys.excepthook, signal.getsignal(signal.SIGTERM)
    libc, action = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.sigaction(signal.SIGTERM, None, action)
    os.environ.update({**wanted, **variables})
    try:
        yield
    finally:
        for name in os.environ.keys() | variables.keys():
            if name not in variables:
                del os.environ[name]
            elif os.environ.get(name) != variables[name]:
                os.environ[name] = variables[name]
        sys.excepthook = hook
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        libc.sigaction(signal.SIGTERM, action, None)
