"""In the place of Flower's command ``flwr-clientapp``: forks a process that has torch in memory already.

Flower starts a process for each message, and importing torch takes most of its time. The first process that is started
for a node becomes a fork server: it imports what every ClientApp needs of other libraries (never the app itself, which
comes with each run), forks a child for its message, and goes on listening. Those started later hand their arguments
over and end. So each message still has a process of its own, as Flower means it, with nothing left of earlier ones.

The server ends with the process that started it, the SuperExec of one SuperNode. It is found by a socket whose name
says which that is, and believed only if it is of the same user. Where anything of this is impossible, the command does
what Flower's does. This file stands for itself: it imports nothing of fedsim, so that it can be copied to nodes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path

# What ClientApps import of others, and what of these takes long
LIBRARIES = ("numpy", "torch", "hydra", "omegaconf", "safetensors.torch", "yaml", "flwr.clientapp")
COMMAND = "flwr.supernode.cli.flwr_clientapp"
FURTHER = "FEDSIM_PRELOAD"  # modules to import as well, separated by spaces; only where no run brings another version
PLACE = "bin/flwr-clientapp"  # in a node's folder
LOOK = 0.5  # seconds between looks whether the parent lives
MOST = 1 << 16  # bytes of arguments
SPARING = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # read once, when a process starts


def main() -> None:
    """Hand over, or become the server; in a child, or where neither is possible, be Flower's command."""
    arguments, parent = sys.argv[1:], os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or no sockets: as without a server
        server = _listening() if _starts(parent, arguments) else None
        if server is None:
            if _handed_over(arguments):
                return
        else:
            _as_usual(server)
            arguments = _serve(server, arguments, parent)
    sys.argv = ["flwr-clientapp", *arguments]
    importlib.import_module(COMMAND).flwr_clientapp()


def _starts(parent: int, arguments: list[str]) -> bool:
    """Whether ``parent`` is the process that Flower names as this one's starter. If that has died, another one took
    its place, which may never end, and no server must hang on it."""
    named = [b for a, b in itertools.pairwise(arguments) if a == "--parent-pid"]
    return not named or named[-1] == str(parent)


def _as_usual(server: socket.socket) -> None:
    """Start again without the node's settings of memory, which are for what passes messages on, not for training."""
    if found := [name for name in SPARING if name in os.environ]:
        for name in found:
            del os.environ[name]
        server.close()
        os.execv(sys.executable, [sys.executable, "-P", str(Path(__file__).resolve()), *sys.argv[1:]])


def _name() -> str:
    """Of the socket: by the parent, and by what tells apart containers that share a network."""
    spaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "mnt")]  # noqa: PTH116
    return f"\0fedsim-forkserver-{os.getuid()}-{'-'.join(map(str, spaces))}-{os.getppid()}"


def _listening() -> socket.socket | None:
    """The socket of a server that is to be; None if there is one already."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(_name())
    except OSError:
        server.close()
        return None
    server.listen(8)
    return server


def _handed_over(arguments: list[str]) -> bool:
    """Whether the server took them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(60.0)  # it may be importing still
        link.connect(_name())
        if not _ours(link):
            return False
        link.sendall(json.dumps(arguments).encode() + b"\n")
        return link.recv(2) == b"ok"


def _ours(link: socket.socket) -> bool:
    """Whether a process of this user is at the other end."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(user == os.getuid())


def _serve(server: socket.socket, arguments: list[str], parent: int) -> list[str]:
    """Fork a child for each message; returns only in a child, with its arguments. Ends with the parent."""
    for name in (*LIBRARIES, COMMAND, *os.environ.get(FURTHER, "").split()):
        with contextlib.suppress(Exception):  # the child will say what is wrong
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported stays in memory that children share: their collector does not look at it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that ended need nobody to wait for them
    server.settimeout(LOOK)
    wanted: list[str] | None = arguments
    while os.getppid() == parent:
        if wanted is not None and os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            return wanted
        wanted = _next(server)
    os._exit(0)


def _next(server: socket.socket) -> list[str] | None:
    """Arguments of the next message, if one comes soon."""
    try:
        link, _ = server.accept()
    except TimeoutError:
        return None
    with link:
        link.settimeout(10.0)
        try:
            if not _ours(link):
                return None
            text = b""
            while not text.endswith(b"\n") and len(text) < MOST:
                if not (more := link.recv(4096)):
                    return None
                text += more
            found = json.loads(text)
            link.sendall(b"ok")
        except (OSError, ValueError):
            return None
    return [str(word) for word in found]


def as_command() -> str:
    """This file as a command for a machine that may have no fedsim: run by the Python of its PATH."""
    return f"#!/usr/bin/env -S python3 -P\n{Path(__file__).read_text()}"


def install(folder: Path, python: str = sys.executable) -> Path:
    """Put a command ``flwr-clientapp`` that does this into ``folder``, which is to be first on a node's PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / "flwr-clientapp"
    here = Path(__file__).resolve()
    command.write_text(f"#!/bin/sh\nexec '{python}' -P '{here}' \"$@\"\n")
    command.chmod(0o755)
    return command


if __name__ == "__main__":
    main()
