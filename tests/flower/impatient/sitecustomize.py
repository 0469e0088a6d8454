"""On the path of real nodes: a SuperNode without work looks again after 3 s, whatever it is told; here it is sooner."""

from __future__ import annotations

import sys
import time

_sleep = time.sleep

if any(word.endswith("flower-supernode") for word in sys.orig_argv):
    time.sleep = lambda seconds: _sleep(0.2 if seconds == 3 else seconds)
