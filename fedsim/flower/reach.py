"""``fedsim deploy check``: why a node would not reach its server, or a program not get its port, in one line."""

from __future__ import annotations

import argparse
import errno
import http.client
import socket
import ssl
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

from fedsim.errors import ConfigError, EngineError
from fedsim.flower.nodesettings import read_file

LIMIT = 10.0  # seconds for each step: a name's address, the connection, the greeting
AHEAD, BEHIND = 5.0, 300.0  # seconds that a node's clock may be off: it signs what it asks for, with the time
COARSE = 2.0  # seconds by which the time in an answer may be old: whole seconds, put down once in each


def check(argv: Sequence[str]) -> int:
    """Whether nodes on this machine reach a SuperLink, a port is free here, and a node's settings can be read."""
    parser = argparse.ArgumentParser(prog="fedsim deploy check", description=(check.__doc__ or ""))
    parser.add_argument("server", nargs="?", metavar="HOST:PORT", help="a SuperLink")
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="ca.crt; else no TLS")
    parser.add_argument("--port", type=int, help="that a program is to listen on, on this machine")
    parser.add_argument("--node-config", type=Path, metavar="FILE", help="a node's settings")
    args = parser.parse_args(argv)
    if args.server is None and args.port is None and args.node_config is None:
        raise ConfigError("fedsim deploy check: give HOST:PORT, --port, or --node-config")
    if args.node_config is not None:
        print(read_file(args.node_config))
    if args.port is not None:
        print(can_listen(args.port))
    if args.server is not None:
        print(reach(args.server, args.root_certificates))
    return 0


def reach(server: str, ca: Path | None = None) -> str:
    """What is true of ``server`` (``host:port``), asked as a node asks: over TLS if ``ca`` is given, else in the clear.

    Raises:
        ConfigError: if the address or the authority's file cannot be.
        EngineError: one line on why nodes will not get through, and what to do.
    """
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    if not host or "/" in server or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{server}: an address is written host:port, as in fl.lab.org:8000")
    trusted = None if ca is None else _trusting(ca)
    link: http.client.HTTPConnection
    if trusted is None:
        link = http.client.HTTPConnection(host, int(port), timeout=LIMIT)
    else:
        link = http.client.HTTPSConnection(host, int(port), timeout=LIMIT, context=trusted)
    try:
        link.request("GET", "/health")
        answer = link.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise EngineError(f"{server}: {_why(error, trusted is not None, host)}") from None
    finally:
        link.close()
    if answer.status != 200:
        raise EngineError(
            f"{server}: something answers ({answer.status}), but it is no SuperLink; is the port right?"
        )
    if trusted is not None and (why := _off(answer.getheader("Date"), time.time())):
        raise EngineError(f"{server}: {why}")
    return f"{server}: a SuperLink answers {'over TLS, as ' + str(ca) + ' vouches for' if trusted else 'without TLS'}"


def can_listen(port: int, host: str = "0.0.0.0") -> str:
    """That a program can have ``port`` here; EngineError if another one has it, or this user may not."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((host, port))
        except (OSError, OverflowError) as error:
            code = getattr(error, "errno", None)
            why = {errno.EADDRINUSE: "is taken by another program; stop that, or give another --port"}
            why |= {errno.EACCES: "is not for this user; give one above 1023"}
            raise EngineError(f"port {port} {why.get(code or 0, f'cannot be had: {error}')}") from None
    return f"port {port}: free"


def _off(date: str | None, now: float) -> str:
    """Why the link refuses what a node signs here, where the server says that it is ``date`` and this machine
    ``now``."""
    try:
        late = now - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return ""  # it does not say
    if -BEHIND <= late <= AHEAD + COARSE:
        return ""
    way = "ahead of" if late > 0 else "behind"
    return (
        f"this machine's clock is {abs(late):.0f} s {way} the server's; a node is refused {AHEAD:g} s ahead and "
        f"{BEHIND:g} s behind: set the clock (NTP)"
    )


def _trusting(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{ca}: no certificate of an authority ({error})") from None


def _why(error: Exception, secure: bool, host: str) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        said = str(error.verify_message)
        if "mismatch" in said or "match" in said:
            return (
                f"its certificate does not name {host}; make one that does (fedsim provision --server {host}), or "
                "type a name that it has"
            )
        if "expired" in said or "not yet valid" in said:
            return f"its certificate does not hold now ({said}); renew it, or set the clock"
        return f"its certificate is not of this authority ({said}); take ca.crt of the federation's folder"
    if isinstance(error, ssl.SSLError):
        return f"no TLS there ({error.reason or error}); start the SuperLink with its certificate, not with --insecure"
    if not secure and isinstance(error, http.client.HTTPException | ConnectionResetError):
        return "it does not answer in the clear; it may want TLS: give --root-certificates ca.crt"
    if isinstance(error, socket.gaierror):
        return f"{host} has no address here ({error.strerror}); is the name right?"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there; is the SuperLink started, and the port right?"
    if isinstance(error, TimeoutError):
        return f"no answer within {LIMIT:g} s; a firewall may be between"
    return f"{type(error).__name__}: {error}"
