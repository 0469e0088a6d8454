"""What a node says of a failure: all of it in its own log, and to the server what happened and where."""

from __future__ import annotations

import logging
import re
import traceback
from pathlib import Path

from fedsim.errors import headline

log = logging.getLogger(__name__)

_FRAME = re.compile(r'^\s*File "(.+)", line (\d+)', re.MULTILINE)


def briefly(reason: str, client: int, round: int) -> str:
    """The error's class, message, file name and line, of a ``reason`` that may be a traceback: values and paths in the
    frames above it are nobody's business beyond this machine."""
    log.error("client %d failed in round %d:\n%s", client, round, reason.strip())
    return _said(reason)


def unforeseen(error: BaseException, whose: str) -> str:
    """The same of an error outside of the client's own code, such as of a message that is none."""
    text = "".join(traceback.format_exception(error))
    log.error("%s: a message could not be worked on:\n%s", whose, text.strip())
    return _said(text)


def _said(text: str) -> str:
    frames = _FRAME.findall(text)
    where = f" ({Path(frames[-1][0]).name}, line {frames[-1][1]})" if frames else ""
    return f"{headline(text)}{where}; the traceback is in the node's log"
