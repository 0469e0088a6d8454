"""A stand-in for nginx with ``server/proxy.conf``: the same places pass, everything else is answered by 403."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

KEPT_BACK = ("content-length", "transfer-encoding", "connection", "host", "content-encoding")


def passing(conf: str) -> list[tuple[bool, str]]:
    """Whether a place must be met exactly, and its name, of those that the file passes on."""
    words = [
        line.split()
        for line in conf.splitlines()
        if line.strip().startswith("location") and "403" not in line
    ]
    return [(w[1] == "=", w[-2]) for w in words]


@contextmanager
def gatekeeper(folder: Path, port: int, inner: int) -> Iterator[list[tuple[str, int]]]:
    """Listen on ``port`` for ``127.0.0.1:inner``, with ``folder``'s certificates; path and status of each request."""
    places, seen = passing((folder / "proxy.conf").read_text()), list[tuple[str, int]]()
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    upstream = httpx.AsyncClient(base_url=f"https://127.0.0.1:{inner}", verify=context, timeout=600)

    async def handle(request: Request) -> Response:
        path = request.url.path
        if not any(path == place if exact else path.startswith(place) for exact, place in places):
            seen.append((path, 403))
            return Response(status_code=403)
        headers = [(k, v) for k, v in request.headers.raw if k.decode() not in KEPT_BACK]
        came = await upstream.request(
            request.method,
            request.url.path,
            params=request.query_params,
            headers=headers,
            content=await request.body(),
        )
        seen.append((path, came.status_code))
        kept = {k: v for k, v in came.headers.items() if k not in KEPT_BACK}
        return Response(came.content, came.status_code, kept)

    app = Starlette(routes=[Route("/{path:path}", handle, methods=["GET", "POST", "PUT", "DELETE"])])
    certificate = {"ssl_certfile": folder / "server.crt", "ssl_keyfile": str(folder / "server.key")}
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", **certificate)
    )  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    try:
        yield seen
    finally:
        server.should_exit = True
        thread.join(10)
