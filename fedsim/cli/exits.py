"""How the command ends: its exit codes, and what is printed of an error. Imports nothing heavy."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

DONE, FAILED, BAD_CONFIG, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
PATIENCE = 20  # seconds that jobs in other processes have for their checkpoints; Slurm grants 30 in all
AGAIN = "the same command goes on where it stopped"


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as from Slurm at the end of the time: like Ctrl-C, the last finished round is checkpointed."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM raises ``Terminated``, once jobs in other processes have ended by theirs; a second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        children, last = multiprocessing.active_children(), time.monotonic() + PATIENCE
        for child in children:
            child.terminate()
        for child in children:
            child.join(max(0.0, last - time.monotonic()))
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def guarded(work: Callable[[], int], overrides: Sequence[str] = ()) -> int:
    """Run ``work``; turn what it raises into a message on stderr and an exit code."""
    try:
        with terminable():
            return work()
    except SystemExit as end:  # of an argument parser, or of Hydra's own flags
        return end.code if isinstance(end.code, int) else DONE if end.code is None else FAILED
    except Terminated:
        print(f"\nfedsim: terminated (SIGTERM); {AGAIN}", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print(f"\nfedsim: interrupted; {AGAIN}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        code, text = diagnose(error, overrides)
        print(text, file=sys.stderr)
        return code


def diagnose(error: Exception, overrides: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and text of an error: one line for those that explain themselves, else the traceback."""
    from hydra.errors import HydraException

    from fedsim.errors import CheckpointError, ConfigError, DataError, FedsimError

    if isinstance(error, FedsimError):
        code = BAD_CONFIG if isinstance(error, ConfigError | DataError | CheckpointError) else FAILED
        return code, f"fedsim: {error}"
    if isinstance(error, HydraException):
        from fedsim.config.explain import explain

        return BAD_CONFIG, f"fedsim: {explain(error, overrides)}"
    if isinstance(error, FileExistsError | NotADirectoryError | PermissionError) and error.filename:
        return FAILED, f"fedsim: {error.filename}: {error.strerror}; give another folder or file"
    return FAILED, "".join(traceback.format_exception(error)).rstrip()
