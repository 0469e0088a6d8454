"""A report that follows runs under way: served to this machine only, built again only when their files have changed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import unquote, urlsplit

from fedsim.errors import ConfigError, FedsimError
from fedsim.report.page import LIVE, filled, shipped
from fedsim.report.progress import Progress

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LOOK = 1.0  # seconds between two looks at the files, however many pages ask
SHARE = 0.1  # of the time at most that goes into building reports
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".tex": "text/plain; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
}


class LiveReport:
    """The report of the runs in ``dirs``, which ``build()`` writes into the folder ``out``."""

    def __init__(self, dirs: Sequence[Path], out: Path, build: Callable[[], object]) -> None:
        self.out, self.version, self.remark = out, 0, ""
        self._progress, self._build = Progress(dirs, out), build
        self._lock, self._looked, self._next = (
            Lock(),
            -LOOK,
            0.0,
        )  # the latter two in seconds of a monotonic clock
        self._built: object = None  # the files' state at the last build
        self._page = ""

    def refresh(self) -> None:
        """Look at the runs' files and build the report again if they changed, unless that was done just now."""
        if not self._lock.acquire(blocking=self.version == 0):
            return  # someone else is at it
        try:
            now = time.monotonic()
            if now - self._looked < LOOK:
                return
            self._looked = now
            state = self._progress.look()
            if state == self._built or (self.version and now < self._next):
                return
            if self._progress.runs:
                self._write()
            self._built, self.version = state, self.version + 1
            took = time.monotonic() - now
            self._looked, self._next = time.monotonic(), time.monotonic() + took * (1 / SHARE - 1)
        finally:
            self._lock.release()

    def _write(self) -> None:
        """Build; what cannot be read now (a file half written, a folder taken away) may be there at the next look."""
        try:
            self._build()
            self._page, self.remark = (self.out / "report.html").read_text(encoding="utf-8"), ""
        except Exception as error:  # the page lives on, whatever damaged files bring
            reason = str(error) if isinstance(error, FedsimError | OSError | ValueError) else repr(error)
            self.remark = f"The report could not be built: {reason}"
            log.warning("%s", self.remark)

    def page(self) -> str:
        """The report with how the runs get on above it."""
        waiting = {"title": "No runs yet", "lead": "This page shows them as soon as there are any."}
        empty = dict.fromkeys(
            ("facts", "results", "curves", "clients", "partition", "configuration", "failures", "reproduce"),
            "",
        )
        text = self._page or filled({**empty, **waiting})
        section = (
            f'<script>{shipped("live.js")}</script>\n<section id="progress" data-version="{self.version}">'
            f'<h2>Runs</h2>\n<div id="runs">{self._progress.html()}</div>\n'
            '<p class="soft" id="live" role="status" aria-live="polite"></p></section>\n'
        )
        return text.replace(LIVE, section, 1)

    def state(self) -> str:
        """What an open page asks for every two seconds, as JSON."""
        return json.dumps({"version": self.version, "progress": self._progress.html(), "remark": self.remark})


def server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server of the report on 127.0.0.1, not yet serving; port 0 takes any free one.

    Raises:
        ConfigError: if the port cannot be had.
    """

    class PageRequest(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing: a page asks every two seconds."""

        def _answer(self, body: bool) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (HOST, "localhost"):  # a name that another site made point here
                self._send(HTTPStatus.FORBIDDEN, b"only for 127.0.0.1\n", "text/plain", body)
                return
            status, content, kind = answer(report, self.path)
            self._send(status, content, kind, body)

        def _send(self, status: HTTPStatus, content: bytes, kind: str, body: bool) -> None:
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
            for name, value in {**headers, "X-Content-Type-Options": "nosniff"}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    class PageServer(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Says nothing of a page that was closed while it was being answered."""
            log.debug("an answer could not be sent", exc_info=True)

    try:
        return PageServer((HOST, port), PageRequest)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--port {port}: {HOST}:{port} cannot be had ({said}); give another, or 0 for any"
        ) from error


def answer(report: LiveReport, path: str) -> tuple[HTTPStatus, bytes, str]:
    """Status, content and type of what stands at ``path``: the page, its state, or a file of the report's folder."""
    name = unquote(urlsplit(path).path).removeprefix("/")
    if name in ("", "report.html", "state"):
        report.refresh()
        text, kind = (report.state(), KINDS[".json"]) if name == "state" else (report.page(), KINDS[".html"])
        return HTTPStatus.OK, text.encode(), kind
    if name in set(_files(report.out)):
        return HTTPStatus.OK, (report.out / name).read_bytes(), KINDS[Path(name).suffix]
    return HTTPStatus.NOT_FOUND, b"no such file in this report\n", "text/plain"


def serve(report: LiveReport, port: int, say: Callable[[str], object] = print) -> None:
    """Serve until interrupted (``KeyboardInterrupt``, which ends it quietly unless it is of a subclass)."""
    with server(report, port) as live:
        say(f"report:  http://{HOST}:{live.server_address[1]}/ (this machine only; Ctrl-C ends it)")
        try:
            live.serve_forever(poll_interval=0.5)
        except KeyboardInterrupt as end:
            if type(end) is not KeyboardInterrupt:
                raise


def _files(out: Path) -> Iterator[str]:
    """Names of the report's own files: no links, nothing in folders."""
    if out.is_dir():
        with os.scandir(out) as entries:
            yield from (
                e.name for e in entries if e.is_file(follow_symlinks=False) and Path(e.name).suffix in KINDS
            )


__all__ = ["HOST", "LiveReport", "answer", "serve", "server"]
