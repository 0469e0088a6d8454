"""``fedsim provision``: all that a federation's machines need to know each other, in a folder for each of them."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsim.errors import ConfigError
from fedsim.flower import forkserver, machines
from fedsim.flower.certificates import Authority, new_key, openssh, pem, public_line, readable_line

PORT = 8000
ALWAYS = (
    "localhost",
    "127.0.0.1",
    "link",
)  # how the server's own processes, and those of its containers, reach it
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DOMAIN = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)


@dataclass(frozen=True)
class Membership:
    """What was asked for: nodes by name with the clients that each is, and how the server is reached."""

    nodes: Mapping[str, int]
    hosts: Sequence[str]
    port: int = PORT
    days: int = 365
    public: Mapping[str, str] = field(default_factory=dict)  # keys that nodes made themselves, one line each
    authority: Authority | None = None  # of an earlier time, which nodes trust already; None: a new one


def provision(argv: Sequence[str]) -> int:
    """Make an authority, a server's certificate, the nodes' keys, scripts and compose files: a folder a machine."""
    parser = argparse.ArgumentParser(prog="fedsim provision", description=(provision.__doc__ or ""))
    parser.add_argument(
        "--nodes",
        nargs="+",
        required=True,
        metavar="NAME",
        help="of the nodes, in the order of their clients",
    )
    parser.add_argument(
        "--server",
        nargs="+",
        default=["localhost"],
        metavar="HOST",
        help="names or addresses under which nodes reach the server; the first stands in their scripts",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"of the server; default {PORT}")
    parser.add_argument(
        "--days", type=int, default=365, help="that the server's certificate holds; default 365"
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="DIR",
        help="NAME.pub of nodes that made their own key (ssh-keygen -t ecdsa)",
    )
    parser.add_argument(
        "--authority",
        type=Path,
        metavar="DIR",
        help="that signed before (DIR/ca.key, DIR/ca.crt): a renewed certificate, further nodes; default: a new one",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("provision"), metavar="DIR", help="default: provision"
    )
    parser.add_argument("--json", action="store_true", help="print what was made as JSON, and nothing else")
    args = parser.parse_args(argv)
    wanted = asked(args)
    try:
        written = write(wanted, args.out)
    except OSError as error:
        raise ConfigError(f"--out {args.out}: cannot be written ({error.strerror or error})") from None
    if args.json:
        print(json.dumps({"schema": 1, "out": str(args.out), "files": written}, indent=1, sort_keys=True))
        return 0
    for name, files in written.items():
        print(f"{args.out / name}: {', '.join(files)}")
    print(f"next: {args.out / 'README.md'}")
    return 0


def asked(args: argparse.Namespace) -> Membership:
    """The arguments, checked; ConfigError names the first that cannot be."""
    for name in args.nodes:
        if not _NAME.fullmatch(name) or name in machines.OWN:
            raise ConfigError(
                f"--nodes {name}: small letters, digits and dashes, and none of {', '.join(machines.OWN)}"
            )
        if args.nodes.count(name) > 1:
            raise ConfigError(f"--nodes {name}: given twice; each node has a name of its own")
    for host in args.server:
        if not _is_address(host) and not _DOMAIN.fullmatch(host):
            raise ConfigError(
                f"--server {host}: neither a host's name nor an address; the port goes into --port"
            )
    if not 0 < args.port < 65535:  # behind the proxy the SuperLink has the next one
        raise ConfigError(f"--port {args.port}: must be between 1 and 65534")
    if args.days < 1:
        raise ConfigError(f"--days {args.days}: must be at least 1")
    nodes = {name: client for client, name in enumerate(args.nodes)}
    authority = None if args.authority is None else Authority.read(args.authority)
    return Membership(nodes, args.server, args.port, args.days, _brought(args.keys, args.nodes), authority)


def write(wanted: Membership, out: Path) -> dict[str, list[str]]:
    """Make everything in ``out``, which must not exist, or be empty; the names of the files by machine.

    Private keys can be read by their owner only (mode 600), folders be entered by their owner only.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists; keys in use are not replaced: give another --out, or remove it yourself"
        )
    authority = wanted.authority or Authority.new("fedsim federation")
    hosts = list(dict.fromkeys([*wanted.hosts, *ALWAYS]))
    key, certificate = authority.server(wanted.hosts[0], hosts, wanted.days)
    files: dict[str, dict[str, bytes]] = {
        "authority": {"ca.crt": pem(authority.certificate), "ca.key": pem(authority.key)},
        "server": {
            "ca.crt": pem(authority.certificate),
            "server.crt": pem(certificate),
            "server.key": pem(key),
        },
    }
    public = dict(wanted.public)
    for name in wanted.nodes:
        files[name] = {"ca.crt": pem(authority.certificate)}
        if name not in public:
            own = new_key()
            files[name]["node.key"], public[name] = openssh(own), public_line(own, name)
        files[name]["node.pub"] = f"{public[name]}\n".encode()
        files["server"][f"keys/{name}.pub"] = files[name]["node.pub"]
    texts = machines.texts(wanted.nodes, public, wanted.hosts[0], wanted.port)
    for machine, more in texts.items():
        files[machine] = files.get(machine, {}) | {name: text.encode() for name, text in more.items()}
    out.mkdir(parents=True, exist_ok=True)
    for machine, contents in files.items():
        for name, content in contents.items():
            _put(out / machine / name, content)
    return {machine: list(contents) for machine, contents in files.items() if machine}


def _put(path: Path, content: bytes) -> None:
    """A new file with the rights it needs from its first byte on; one that exists is an error."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = path.parent.name == Path(forkserver.PLACE).parent.name
    mode = 0o755 if command else {".key": 0o600, ".sh": 0o755}.get(path.suffix, 0o644)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the process's mask
        file.write(content)


def _brought(folder: Path | None, names: Sequence[str]) -> dict[str, str]:
    """Public keys of nodes that made their own, by node."""
    if folder is None:
        return {}
    found = dict[str, str]()
    for name in names:
        path = folder / f"{name}.pub"
        if not path.is_file():
            continue
        line = " ".join([*path.read_text(errors="replace").split()[:2], name])
        if not readable_line(line):
            raise ConfigError(
                f"{path}: no public key of a node; make it by ssh-keygen -t ecdsa -b 384 -N '' -f {name}"
            )
        key = line.split()[1]
        if twin := next((other for other, its in found.items() if its.split()[1] == key), ""):
            raise ConfigError(
                f"{path}: the key of {twin}, too; each node needs its own, or one would be both"
            )
        found[name] = line
    if not found:
        raise ConfigError(f"--keys {folder}: holds no NAME.pub of any of {', '.join(names)}")
    return found


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
