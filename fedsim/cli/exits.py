"""How the command ends: its exit codes, and what is printed of an error. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

DONE, FAILED, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 130


def guarded(work: Callable[[], int], overrides: Sequence[str] = ()) -> int:
    """Run ``work``; turn what it raises into a message on stderr and an exit code."""
    try:
        return work()
    except SystemExit as end:  # of an argument parser, or of Hydra's own flags
        return end.code if isinstance(end.code, int) else DONE if end.code is None else FAILED
    except KeyboardInterrupt:
        print("\nfedsim: interrupted; the same command goes on where it stopped", file=sys.stderr)
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
    return FAILED, "".join(traceback.format_exception(error)).rstrip()
