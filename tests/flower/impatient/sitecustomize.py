"""On the path of real nodes: a SuperNode without work looks again after 3 s, whatever it is told; here it is sooner.
With a file ``hostile`` in the test's folder, client 1 is hostile."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

_sleep = time.sleep

if any(word.endswith("flower-supernode") for word in sys.orig_argv):
    time.sleep = lambda seconds: _sleep(0.2 if seconds == 3 else seconds)


class Hostile:
    """Changes what client 1 answers, once ``fedsim.flower.answers`` is imported: it says that it is client 0."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "fedsim.flower.answers":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            honest = module.answer_records

            def answer_records(answer: Any, layout: Any, to: Any) -> Any:
                content = honest(answer, layout, to)
                if to.client == 1:
                    content["outcome"]["client"] = 0
                return content

            module.answer_records = answer_records

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if (Path(os.environ.get("FEDSIM_TESTS", "/nowhere")) / "hostile").exists():
    sys.meta_path.insert(0, Hostile())  # type: ignore[arg-type]
