"""nginx itself with ``server/proxy.conf``, before a stand-in for the SuperLink that notes what it is asked for."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import wait_until

from fedsim.cli.main import command
from fedsim.flower.processes import free_port

DETOURS = (  # to orders, by way of the nodes' place
    "/v1/control/start-run",
    "//v1/control/start-run",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/control/start-run%3f/../../fleet/x",
    "/v1/control/start-run%23/../../fleet/x",
    "/v1/control/start-run%00/../../fleet/x",
    "/v1/control/start-run/../../fleet/x",
    "/v1/runtime/acquire-task",
)


@contextlib.contextmanager
def linked(folder: Path, port: int) -> Iterator[list[str]]:
    """What a server of that certificate was asked for."""
    seen = list[str]()

    class Link(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    link = ThreadingHTTPServer(("127.0.0.1", port), Link)
    link.socket = context.wrap_socket(link.socket, server_side=True)
    threading.Thread(target=link.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield seen
    finally:
        link.shutdown()
        link.server_close()


def asked(port: int, ca: Path, path: str, stated: int = 0) -> int:
    """The status of a request that states a body of so many bytes and sends none."""
    context = ssl.create_default_context(cafile=str(ca))
    link = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    with contextlib.closing(link):
        link.putrequest("POST", path)
        link.putheader("Content-Length", str(stated))
        link.endheaders()
        return link.getresponse().status


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here: test_provision.py reads its file")
def test_no_detour_leads_to_orders_and_no_flood_to_the_link(tmp_path: Path) -> None:
    port, lab = free_port(), tmp_path / "lab"
    assert command(["provision", "--nodes", "a", "--port", str(port), "--out", str(lab)]) == 0
    server, ca = lab / "server", lab / "server/ca.crt"
    with linked(server, port + 1) as seen:
        words = ["nginx", "-p", str(server), "-c", str(server / "proxy.conf"), "-g", "daemon off;"]
        proxy = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: listens(port), 20, "nginx")
            assert asked(port, ca, "/health") == asked(port, ca, "/v1/fleet/pull-messages?a=1") == 200
            assert seen == ["/health", "/v1/fleet/pull-messages?a=1"]
            for path in DETOURS:
                assert asked(port, ca, path) in (200, 400, 403), path
            assert all(path.startswith("/v1/fleet/") and ".." not in path for path in seen[1:]), seen
            assert asked(port, ca, "/v1/fleet/push-object", 33 << 20) == 413
        finally:
            proxy.terminate()
            proxy.wait()
