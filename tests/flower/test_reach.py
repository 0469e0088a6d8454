"""What keeps a node from its server is said in one line, soon: taken ports, no TLS, another certificate."""

from __future__ import annotations

import ssl
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fedsim.cli.main import command
from fedsim.flower.certificates import Authority, pem
from fedsim.flower.processes import free_port


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() + self.server.off)  # type: ignore[attr-defined]

    def log_message(self, *args: object) -> None: ...


def serving(context: ssl.SSLContext | None, clock: float = 0.0) -> HTTPServer:
    """A server whose clock is ``clock`` seconds ahead."""

    class Server(HTTPServer):
        off = clock

        def handle_error(self, *args: object) -> None: ...

        def get_request(self):  # type: ignore[no-untyped-def]
            connection, address = super().get_request()
            connection.settimeout(5)
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            return connection, address

    server = Server(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Servers: ``tls``, ``plain``, ``elsewhere`` (its certificate names another host), ``expired``, and two whose clock
    is off; authorities' files."""
    folder = tmp_path_factory.mktemp("reach")
    ours, other = Authority.new("ours"), Authority.new("other")
    (folder / "ca.crt").write_bytes(pem(ours.certificate))
    (folder / "other.crt").write_bytes(pem(other.certificate))
    (folder / "none.crt").write_text("no certificate")
    servers = {"plain": serving(None)}
    for name, host, days, clock in (
        ("tls", "127.0.0.1", 1, 0),
        ("elsewhere", "fl.lab.org", 1, 0),
        ("expired", "127.0.0.1", -0.01, 0),
        ("late", "127.0.0.1", 1, -30),
        ("early", "127.0.0.1", 1, 400),
    ):
        key, certificate = ours.server(host, [host], days)  # type: ignore[arg-type]
        (folder / f"{name}.key").write_bytes(pem(key))
        (folder / f"{name}.crt").write_bytes(pem(certificate))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
        servers[name] = serving(context, clock)
    out = {name: f"127.0.0.1:{s.server_port}" for name, s in servers.items()}
    yield out | {f.name: str(f) for f in folder.glob("*.crt")} | {"nobody": f"127.0.0.1:{free_port()}"}
    for server in servers.values():
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("server", "ca", "code", "said"),
    [
        ("tls", "ca.crt", 0, "a SuperLink answers over TLS"),
        ("plain", "", 0, "a SuperLink answers without TLS"),
        ("tls", "", 1, "it may want TLS: give --root-certificates ca.crt"),
        ("plain", "ca.crt", 1, "no TLS there"),
        ("tls", "other.crt", 1, "its certificate is not of this authority"),
        ("elsewhere", "ca.crt", 1, "its certificate does not name 127.0.0.1; make one that does"),
        ("expired", "ca.crt", 1, "its certificate does not hold now (certificate has expired); renew it"),
        ("late", "ca.crt", 1, "s ahead of the server's; a node is refused 5 s ahead and 300 s behind"),
        ("early", "ca.crt", 1, "s behind the server's; a node is refused"),
        ("nobody", "ca.crt", 1, "nobody listens there; is the SuperLink started"),
        ("tls", "none.crt", 2, "none.crt: no certificate of an authority"),
        ("no-port", "", 2, "no-port: an address is written host:port"),
        ("no.such.host.invalid:1", "", 1, "no.such.host.invalid has no address here"),
    ],
)
def test_one_line_soon(
    server: str, ca: str, code: int, said: str, place: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words, began = ["deploy", "check", place.get(server, server)], time.monotonic()
    assert command([*words, *(["--root-certificates", place[ca]] if ca else [])]) == code
    captured = capsys.readouterr()
    text = captured.err if code else captured.out
    assert said in text and text.count("\n") == 1 and time.monotonic() - began < 30


def test_ports(place: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    taken = place["plain"].rpartition(":")[2]
    assert command(["deploy", "check", "--port", taken]) == 1
    assert capsys.readouterr().err == (
        f"fedsim: port {taken} is taken by another program; stop that, or give another --port\n"
    )
    assert command(["deploy", "check", "--port", str(free_port())]) == 0
    assert command(["deploy", "check"]) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition-id 0", "cannot be read (Expected '=' after a key"),
        ("clients = [0, 1]", "clients=[0, 1]: must be a number, true, false, or text in quotes"),
        ("partition_id = 0", "unknown key 'partition_id' in the node's settings; nearest is 'partition-id'"),
        ('partition-id = "0"', "partition-id='0': must be an integer from 0, without quotes"),
        ("own-data = true", "the node has no partition-id"),
        ("partition-id = 0\nallow = true", "allow=True: must be modules and dotted names in quotes"),
        ("partition-id = 0\n[state]\nkeep_days = 0", "state.keep_days=0: must be a positive number"),
    ],
)
def test_a_nodes_settings_are_read_before_flower_reads_them(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "node.toml"
    path.write_text(text)
    assert command(["deploy", "check", "--node-config", str(path)]) == 2
    assert (err := capsys.readouterr().err).startswith(f"fedsim: {path}: {said}") and err.count("\n") == 1
    path.write_text('clients = "0 3"\nmetrics = "x.prom"\n[state]\nkeep_days = 2\n[other]\nkey = 1\n')
    assert command(["deploy", "check", "--node-config", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: client 0, 3\n"
