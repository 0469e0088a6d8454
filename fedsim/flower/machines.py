"""Texts that a provisioned federation's machines start from: scripts, settings, compose files, and who is who."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from fedsim.flower import forkserver

OWN = ("server", "authority", "link", "proxy")  # folders, and services of containers, that are no node's
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1048576",  # what link, nodes and server app free of a model goes back at once
}
# No privileges, nothing writable but the machine's own folder, and no more memory and processes than a run needs
HARDENED = """\
    user: "${FEDSIM_USER:-10001:10001}"
    read_only: true
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    pids_limit: 512
    mem_limit: 8g
    tmpfs: [/tmp]
    restart: unless-stopped
"""


def texts(
    nodes: Mapping[str, int], public: Mapping[str, str], host: str, port: int
) -> dict[str, dict[str, str]]:
    """Files by machine and name; the machine "" is the folder around them."""
    shown = f"[{host}]" if ":" in host else host
    files = {
        "": {"README.md": _readme(nodes, shown, port), "compose.yaml": _together(nodes, port)},
        "server": {
            "start.sh": _start_server(port),
            "flwr.sh": _flwr(port),
            "register.sh": _register(nodes),
            "nodes.yaml": _binding(nodes, public),
            "proxy.conf": _proxy(port),
            "compose.yaml": _compose_server(port),
        },
    }
    for name, client in nodes.items():
        files[name] = {
            "node.toml": _node(name, client),
            "start.sh": _start_node(name, shown, port),
            forkserver.PLACE: forkserver.as_command(),
            "compose.yaml": _compose_node(name, shown, port),
        }
    return files


def _script(purpose: str, body: str) -> str:
    exports = " ".join(f"{k}={v}" for k, v in ENVIRONMENT.items())
    return f"""\
#!/usr/bin/env bash
# {purpose}
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
umask 077
export {exports} FLWR_HOME="$PWD/flwr"
{body}"""


def _start_server(port: int) -> str:
    return _script(
        "The SuperLink: HOST=127.0.0.1 keeps everybody out who is not on this machine (then start proxy.conf too).",
        f"""\
if command -v fedsim > /dev/null; then fedsim deploy check --port "${{PORT:-{port}}}"; fi
exec flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \\
    --enable-supernode-auth --host "${{HOST:-0.0.0.0}}" --port "${{PORT:-{port}}}" --database link.db "$@"
""",
    )


def _flwr(port: int) -> str:
    return _script(
        "Flower's own command, connected to the SuperLink of this folder as 'lab': ./flwr.sh list lab",
        f"""\
mkdir -p flwr
cat > flwr/config.toml <<END
[superlink]
default = "lab"
[superlink.lab]
address = "127.0.0.1:${{PORT:-{port}}}"
root-certificates = "$PWD/ca.crt"
END
cd "${{OLDPWD:-.}}"
exec flwr "$@"
""",
    )


def _register(nodes: Mapping[str, int]) -> str:
    lines = "".join(
        f"./flwr.sh supernode register keys/{name}.pub lab --name {name} || failed=1\n" for name in nodes
    )
    return _script(
        "Once, while the SuperLink runs: the keys of this federation's nodes; those that it has stay.",
        f'{lines}exit "${{failed:-0}}"\n',
    )


def _binding(nodes: Mapping[str, int], public: Mapping[str, str]) -> str:
    lines = (f"{_key(name)}: [{client}] # {public[name]}\n" for name, client in nodes.items())
    return (
        "# Which client each registered key is: engine.nodes=PATH of this file. Behind each, the key.\n"
        + "".join(lines)
    )


def _key(name: str) -> str:
    """``name`` as a key of YAML, in which ``no`` is false and ``010`` a number."""
    return name if yaml.safe_load(name) == name else f'"{name}"'


def _node(name: str, client: int) -> str:
    return f"""\
# Settings of node {name}: docs/deployment.md of fedsim says what there is.
partition-id = {client}
state-dir = "state"
# data-path = "/data"
# own-data = true
# allow = "my_module"
"""


def _start_node(name: str, host: str, port: int) -> str:
    return _script(
        f"The SuperNode {name}; PORT is of its own interface, on this machine only.",
        f"""\
: "${{SUPERLINK:={host}:{port}}}" "${{PORT:=9094}}"
export PATH="$PWD/bin:$PATH"  # processes for messages are forked, not started
if command -v fedsim > /dev/null; then  # what is wrong, in one line
    fedsim deploy check "$SUPERLINK" --root-certificates ca.crt --port "$PORT" --node-config node.toml
fi
exec flower-supernode --root-certificates ca.crt --auth-supernode-private-key node.key \\
    --superlink "$SUPERLINK" --host 127.0.0.1 --port "$PORT" --node-config node.toml "$@"
""",
    )


def _proxy(port: int) -> str:
    """nginx in front of a SuperLink that listens on 127.0.0.1: nodes' requests pass, orders to run something do not."""
    inner = """\
            proxy_ssl_trusted_certificate ca.crt;
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
"""
    link = f"https://127.0.0.1:{port + 1}"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"    {kind}_temp_path nginx-{kind};\n" for kind in kinds)
    return f"""\
# HOST=127.0.0.1 PORT={port + 1} ./start.sh, and beside it: nginx -p "$PWD" -c "$PWD/proxy.conf" -g "daemon off;"
# Only what nodes ask for passes. Who may submit runs logs in on this machine: PORT={port + 1} ./flwr.sh run ...
pid nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_max_body_size 32m; # Flower sends pieces of 5 MB; the link reads a request before it asks who sends it
    limit_conn_zone $binary_remote_addr zone=each:1m;
    limit_conn each 128;
{temporary}\
    server {{
        listen {port} ssl;
        ssl_certificate server.crt;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        location /v1/fleet/ {{
            proxy_pass {link}/v1/fleet/; # with this path the link sees what was compared, not what was typed
{inner}\
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
        location = /health {{
            proxy_pass {link}/health;
{inner}\
        }}
        location / {{ return 403; }}
    }}
}}
"""


def _compose_server(port: int) -> str:
    """The link listens where only the proxy reaches it, which lets nodes' requests through."""
    return f"""\
# FEDSIM_USER=$(id -u):$(id -g) docker compose up
# FEDSIM_USER owns this folder, and is who the containers are (else give the folder to 10001:10001).
# Orders come from inside: docker compose exec link ./flwr.sh run /app lab --run-config ...
services:
  link:
    image: fedsim:latest
    working_dir: /federation
    command: [./start.sh]
    environment: {{HOST: 127.0.0.1, PORT: "{port + 1}"}}
    ports: ["{port}:{port}"]
    volumes: ["./:/federation"]
{HARDENED}\
  proxy:
    image: nginx:stable
    depends_on: [link]
    network_mode: "service:link"
    working_dir: /federation
    entrypoint: [nginx, -p, /federation, -c, /federation/proxy.conf, -g, daemon off;]
    volumes: ["./:/federation"]
{HARDENED}"""


def _compose_node(name: str, host: str, port: int) -> str:
    return f"""\
# FEDSIM_USER=$(id -u):$(id -g) DATA=/data/images docker compose up
# FEDSIM_USER owns this folder, and is who the container is (else give the folder to 10001:10001). DATA is the folder
# with this node's data on its machine; the container sees it as /data, and cannot change it.
services:
  {_key(name)}:
    image: fedsim:latest
    working_dir: /federation
    command: [./start.sh]
    environment: {{SUPERLINK: "${{SUPERLINK:-{host}:{port}}}"}}
    volumes: ["./:/federation", "${{DATA:-./data}}:/data:ro"]
{HARDENED}"""


def _together(nodes: Mapping[str, int], port: int) -> str:
    lines = "".join(f"  - {name}/compose.yaml\n" for name in ("server", *nodes))
    return f"""\
# Everything on one machine, for trying it out:
# FEDSIM_USER=$(id -u):$(id -g) SUPERLINK=link:{port} docker compose up
include:
{lines}"""


def _readme(nodes: Mapping[str, int], host: str, port: int) -> str:
    rows = "".join(
        f"| `{name}` | client {client} | that node's owner, over a safe way |\n"
        for name, client in nodes.items()
    )
    return f"""\
# A federation of {len(nodes)} nodes

| folder | what | who gets it |
|---|---|---|
| `authority` | the key that signs servers | nobody: keep it offline, it can pose as the server |
| `server` | certificate for {host}, public keys of the nodes | the machine that nodes reach as {host}:{port} |
{rows}
1. Server: `./start.sh`, then once `./register.sh`. Only who logs in there should be able to reach anything but
   `/v1/fleet/`: `proxy.conf`, and docs/deployment.md, section 1.
2. Nodes: `./start.sh`, in each folder on its own machine. Settings: `node.toml`.
3. Runs, on the server, from a checkout of fedsim: `server/flwr.sh run . lab --run-config run.toml`, in which
   `overrides` holds `engine.nodes=nodes.yaml`: other keys than a client's own are refused. Paths in it, `dir=` too, are
   from the folder `server`, or whole. A node that is several clients has `clients = "0 3"` in `node.toml` in the place
   of `partition-id`, and `[0, 3]` in `nodes.yaml`.

Private keys (`*.key`) are for their owner only, and in no backup that others read. A lost node key: remove it
(`./flwr.sh supernode unregister NODE-ID lab`), make another, register that.
The server's certificate ends one day, and hospitals join: `fedsim provision --authority`.
"""
