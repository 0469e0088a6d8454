"""TLS and node authentication on this machine, with certificates and keys made here."""

from __future__ import annotations

import datetime
import ipaddress
import shlex
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes as digests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import wait_until
from real import LIMIT, ROOT, events, federation, hashes, left_over, start_node, wait

import fedsim

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]
SETTINGS = (
    "num_clients=2",
    "clients_per_round=2",
    "model=linear",
    "client.epochs=1",
    "tracker=quiet",
    "rounds=2",
)
BOUND = "engine.nodes={hospital0: [0], hospital1: [1]}"
PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


def certificates(folder: Path) -> None:
    """``ca.crt``, and ``server.crt`` with ``server.key`` for 127.0.0.1."""
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in ("ca", "server")}
    names = {n: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in keys}
    now = datetime.datetime.now(datetime.UTC)
    for name, key in keys.items():
        built = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["ca"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(keys["ca"], digests.SHA256())
        )
        (folder / f"{name}.crt").write_bytes(built.public_bytes(PEM))
    form = serialization.PrivateFormat.TraditionalOpenSSL
    (folder / "server.key").write_bytes(keys["server"].private_bytes(PEM, form, PLAIN))


def node_key(folder: Path, name: str) -> Path:
    """An OpenSSH key pair, as ``ssh-keygen -t ecdsa -b 384`` makes it; the private file."""
    key = ec.generate_private_key(ec.SECP384R1())
    form, public = serialization.PrivateFormat.OpenSSH, serialization.PublicFormat.OpenSSH
    (folder / name).write_bytes(key.private_bytes(PEM, form, PLAIN))
    (folder / f"{name}.pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, public)
    )
    return folder / name


def test_tls_and_registered_nodes_only(tmp_path: Path) -> None:
    """FedAvg's twin over TLS; one node joins late, and one whose key nobody registered is turned away."""
    certificates(tmp_path)
    ca = str(tmp_path / "ca.crt")
    link = ["--ssl-ca-certfile", ca, "--ssl-certfile", str(tmp_path / "server.crt")]
    link += ["--ssl-keyfile", str(tmp_path / "server.key"), "--enable-supernode-auth"]
    secure = {
        "link_options": link,
        "node_options": ["--root-certificates", ca],
        "connection": {"root-certificates": ca},
    }
    with federation(tmp_path, nodes=0, scheme="https", **secure) as fed:
        keys = [node_key(tmp_path, name) for name in ("hospital0", "hospital1", "stranger")]
        options = [["--auth-supernode-private-key", str(key)] for key in keys]
        for key in keys[:2]:
            fed.flwr("supernode", "register", f"{key}.pub", "local", "--name", key.name)
        start_node(fed, tmp_path, 0, options=options[0])
        stranger = start_node(fed, tmp_path, 1, "stranger", options=options[2])
        run = fed.submit(ROOT, shlex.join([*SETTINGS, BOUND, f"dir={tmp_path / 'run'}"]))
        wait_until(lambda: events(tmp_path / "run"), LIMIT, "the first node")
        start_node(fed, tmp_path, 1, options=options[1])
        assert wait(fed, run, tmp_path / "run")["status"] == "done"
        assert fed.running[stranger].wait(LIMIT) == 1
        assert "Failed to activate SuperNode" in fed.log(stranger, 1000)
        assert "No SuperNode found with the given public key" in fed.log("link", 1000)
    alone = fedsim.simulate(["engine=serial", *SETTINGS])
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")
