"""``fedsim report --serve``: the report as a page that follows runs under way."""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial

from fedsim.cli.arguments import Arguments, folder
from fedsim.cli.exits import DONE
from fedsim.errors import ConfigError

PORT = 8765


def add_serving(parser: Arguments) -> None:
    """The arguments of the live view."""
    parser.add_argument(
        "--serve",
        action="store_true",
        help="show the report on 127.0.0.1 and follow runs under way; Ctrl-C ends it",
    )
    parser.add_argument("--port", type=int, help=f"of --serve; default {PORT}, 0 takes any free one")


def serve_report(args: argparse.Namespace, build: Callable[[], int]) -> int:
    """Serve what ``build`` writes until Ctrl-C; the exit code."""
    if args.port is not None and not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: ports are 0 (any free one) to 65535")
    for path in args.dirs:
        folder(path)
    from fedsim.report.live import LiveReport, serve
    from fedsim.report.terminal import common_folder

    def quietly() -> None:
        with redirect_stdout(io.StringIO()):
            build()

    out = args.out or common_folder(args.dirs) / "report"
    live = LiveReport(args.dirs, out, quietly)
    with warned_once():
        serve(live, PORT if args.port is None else args.port, partial(print, flush=True))
    return DONE


@contextmanager
def warned_once() -> Iterator[None]:
    """Within, a line that was logged once is not logged again: the report is built over and over."""

    class Once(logging.Filter):
        """Of one handler, which lets each line through once."""

        def __init__(self) -> None:
            super().__init__()
            self.said: set[str] = set()

        def filter(self, record: logging.LogRecord) -> bool:
            text, before = record.getMessage(), len(self.said)
            self.said.add(text)
            return len(self.said) > before

    handlers = logging.getLogger().handlers or [h for h in [logging.lastResort] if h is not None]
    filters = [Once() for _ in handlers]
    for handler, once in zip(handlers, filters, strict=True):
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler, once in zip(handlers, filters, strict=True):
            handler.removeFilter(once)
