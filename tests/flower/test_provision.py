"""``fedsim provision``: what it makes is taken by OpenSSL, ssh-keygen, bash and Flower's own readers."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.config import parse_config_args

sys.path.insert(0, str(Path(__file__).parent))
from gatekeeper import gatekeeper, passing
from localgrid import wait_until
from real import LIMIT, ROOT, hashes, left_over, marked, rows

import fedsim
from fedsim.cli.main import command
from fedsim.flower.options import NODE_KEYS, Node
from fedsim.flower.processes import Federation, free_port

NODES = ("hospital0", "hospital-b", "c")
SETTINGS = (
    *("num_clients=2", "clients_per_round=2", "model=linear", "client.epochs=1", "rounds=2", "tracker=quiet"),
)
HOSTS = ("fl.lab.org", "10.0.0.5", "::1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("provision") / "lab"
    before = os.umask(0)  # rights must not hang on it
    try:
        assert (
            command(["provision", "--nodes", *NODES, "--server", *HOSTS, "--port", "7443", "--out", str(out)])
            == 0
        )
    finally:
        os.umask(before)
    return out


def run(*words: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload, no-any-return]


def test_a_folder_for_each_machine_with_private_keys_where_they_belong(made: Path) -> None:
    assert {p.name for p in made.iterdir()} == {"README.md", "compose.yaml", "authority", "server", *NODES}
    keys = {str(p.relative_to(made)) for p in made.rglob("*.key")}
    assert keys == {"authority/ca.key", "server/server.key", *(f"{n}/node.key" for n in NODES)}
    for path in made.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        rights = {".key": 0o600, ".sh": 0o755}.get(path.suffix, 0o644)
        wanted = 0o700 if path.is_dir() else 0o755 if path.parent.name == "bin" else rights
        assert mode == wanted, path
        private = path.is_file() and "PRIVATE KEY" in path.read_text()
        assert private == (path.suffix == ".key"), path
    assert len({(made / n / "node.key").read_text() for n in NODES}) == 3


def test_the_server_is_who_the_authority_says(made: Path) -> None:
    ca, crt = str(made / "authority/ca.crt"), str(made / "server/server.crt")
    for folder in ("server", *NODES):
        assert (made / folder / "ca.crt").read_text() == Path(ca).read_text()
    for host in ("fl.lab.org", "localhost", "link"):
        done = run("openssl", "verify", "-x509_strict", "-CAfile", ca, "-verify_hostname", host, crt)
        assert done.returncode == 0, done.stderr
    for address in ("10.0.0.5", "127.0.0.1", "::1"):
        assert (
            run("openssl", "verify", "-x509_strict", "-CAfile", ca, "-verify_ip", address, crt).returncode
            == 0
        )
    assert run("openssl", "verify", "-CAfile", ca, "-verify_hostname", "other.org", crt).returncode != 0
    authority = x509.load_pem_x509_certificate(Path(ca).read_bytes())
    server = x509.load_pem_x509_certificate(Path(crt).read_bytes())
    verifier = PolicyBuilder().store(Store([authority])).build_server_verifier(x509.DNSName("fl.lab.org"))
    assert [c.subject for c in verifier.verify(server, [])] == [server.subject, authority.subject]
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    key = serialization.load_pem_private_key((made / "server/server.key").read_bytes(), None)
    assert key.public_key() == server.public_key()
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 365


def test_nodes_keys_are_what_flower_and_ssh_read_and_the_binding_names_them(made: Path) -> None:
    text = (made / "server/nodes.yaml").read_text()
    assert yaml.safe_load(text) == {name: [client] for client, name in enumerate(NODES)}
    lines = dict(line.split(": ", 1) for line in text.splitlines()[1:])
    for name in NODES:
        line = lines[name].partition("# ")[2]
        private = serialization.load_ssh_private_key((made / name / "node.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1"
        public = serialization.load_ssh_public_key(line.encode())
        assert public == private.public_key() and line.endswith(f" {name}")
        assert try_load_public_key(made / "server/keys" / f"{name}.pub")  # as `flwr supernode register` does
        done = run("ssh-keygen", "-y", "-f", str(made / name / "node.key"))
        assert done.stdout.split()[:2] == line.split()[:2], done.stderr


def test_scripts_and_settings_can_be_read(made: Path) -> None:
    scripts = sorted(made.rglob("*.sh"))
    assert len(scripts) == 3 + len(NODES)
    for script in scripts:
        assert run("bash", "-n", str(script)).returncode == 0, script
    registered = (made / "server/register.sh").read_text()
    for client, name in enumerate(NODES):
        values = parse_config_args([str(made / name / "node.toml")])  # as --node-config does
        assert set(values) <= set(NODE_KEYS) and Node.of(values, 3, values["partition-id"]).client == client
        assert f"keys/{name}.pub lab --name {name} || failed=1\n" in registered
        assert ': "${SUPERLINK:=fl.lab.org:7443}"' in (made / name / "start.sh").read_text()


def test_containers_have_no_rights_that_they_do_not_need(made: Path) -> None:
    together = yaml.safe_load((made / "compose.yaml").read_text())["include"]
    assert together == [f"{m}/compose.yaml" for m in ("server", *NODES)]
    services = {}
    for file in together:
        services |= yaml.safe_load((made / file).read_text())["services"]
    assert set(services) == {"link", "proxy", *NODES}
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["user"] == "${FEDSIM_USER:-10001:10001}" and "privileged" not in service
        assert service["security_opt"] == ["no-new-privileges:true"] and service["mem_limit"]
        for volume in service["volumes"]:
            assert volume == "./:/federation" or volume.endswith(":/data:ro"), volume
    assert services["link"]["environment"]["HOST"] == "127.0.0.1", (
        "orders to run something come from inside only"
    )


def test_the_proxy_lets_what_nodes_ask_for_pass_and_nothing_else(made: Path) -> None:
    """Flower's own table of routes: all that a node asks for lies under one prefix, orders to run under another."""
    from flwr.superlink.routers.control.router import router as control
    from flwr.superlink.routers.fleet.router import router as fleet

    text = (made / "server/proxy.conf").read_text()
    assert text.count("{") == text.count("}") and "location / { return 403; }" in text
    assert passing(text) == [(False, "/v1/fleet/"), (True, "/health")]
    assert fleet.prefix == "/v1/fleet" and control.prefix == "/v1/control"
    assert any(route.path.endswith("/start-run") for route in control.routes)  # type: ignore[attr-defined]


def test_nodes_may_bring_public_keys_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "keys"
    own.mkdir()
    run("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(own / "b"), "-C", "someone@there")
    words = ["provision", "--nodes", "a", "b", "--keys", str(own), "--out", str(tmp_path / "out"), "--json"]
    assert command(words) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert "node.key" in files["a"] and "node.key" not in files["b"]
    line = " ".join((own / "b.pub").read_text().split()[:2]) + " b"
    assert (tmp_path / "out/server/nodes.yaml").read_text().endswith(f"b: [1] # {line}\n")
    assert (tmp_path / "out/server/keys/b.pub").read_text() == f"{line}\n"


def test_names_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    names = ["no", "010", "null", "2024-01-01", "a"]
    assert command(["provision", "--nodes", *names, "--out", str(tmp_path / "out")]) == 0
    bound = yaml.safe_load((tmp_path / "out/server/nodes.yaml").read_text())
    assert bound == {name: [client] for client, name in enumerate(names)}
    for name in names:
        assert list(yaml.safe_load((tmp_path / f"out/{name}/compose.yaml").read_text())["services"]) == [name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "a"], "--nodes a: given twice"),
        (["../x"], "--nodes ../x: small letters, digits and dashes"),
        (["server"], "--nodes server: small letters, digits and dashes, and none of server, authority"),
        (["a", "--server", "x;rm -rf"], "--server x;rm -rf: neither a host's name nor an address"),
        (["a", "--server", "fl.org:8000"], "the port goes into --port"),
        (["a", "--port", "0"], "--port 0: must be between 1 and 65534"),
        (["a", "--port", "65535"], "--port 65535: must be between 1 and 65534"),
        (["a", "--days", "0"], "--days 0: must be at least 1"),
        (["a", "--days", "4000"], "--days 4000: the authority's own certificate ends on 20"),
        (["a", "--days", "99999999"], "--days 99999999: the authority's own certificate ends on 20"),
        (
            ["link"],
            "--nodes link: small letters, digits and dashes, and none of server, authority, link, proxy",
        ),
        (["a", "--keys", "."], "--keys .: holds no NAME.pub of any of a"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["provision", "--nodes", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_keys_in_use_are_not_replaced(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (made / "c/node.key").read_bytes()
    assert command(["provision", "--nodes", "c", "--out", str(made)]) == 2
    assert "keys in use are not replaced" in capsys.readouterr().err
    assert (made / "c/node.key").read_bytes() == before
    (tmp_path / "c.pub").write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIG c")
    assert command(["provision", "--nodes", "c", "--keys", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "c.pub: no public key of a node; make it by ssh-keygen -t ecdsa" in capsys.readouterr().err
    for name in "de":
        (tmp_path / f"{name}.pub").write_bytes((made / "c/node.pub").read_bytes())
    both = ["--nodes", "d", "e", "--keys", str(tmp_path), "--out", str(tmp_path / "o")]
    assert command(["provision", *both]) == 2
    assert "e.pub: the key of d, too; each node needs its own" in capsys.readouterr().err


def test_the_same_authority_signs_again_for_nodes_that_keep_their_keys(made: Path, tmp_path: Path) -> None:
    words = ["provision", "--nodes", *NODES, "late", "--authority", str(made / "authority")]
    words += ["--keys", str(made / "server/keys"), "--out", str(tmp_path / "next"), "--server", HOSTS[0]]
    assert command(words) == 0
    crt = str(tmp_path / "next/server/server.crt")
    assert run("openssl", "verify", "-CAfile", str(made / "c/ca.crt"), crt).returncode == 0
    assert (
        crt
        and (tmp_path / "next/server/server.key").read_bytes() != (made / "server/server.key").read_bytes()
    )
    assert {p.parent.name for p in (tmp_path / "next").rglob("node.key")} == {"late"}
    before = (made / "server/nodes.yaml").read_text()
    assert (tmp_path / "next/server/nodes.yaml").read_text().startswith(before)


def test_half_an_authority_is_none(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ca.crt").write_bytes((made / "authority/ca.crt").read_bytes())
    words = ["provision", "--nodes", "a", "--out", str(tmp_path / "out"), "--authority", str(tmp_path)]
    assert command(words) == 2 and "no ca.key and ca.crt of an authority there" in capsys.readouterr().err
    (tmp_path / "ca.key").write_bytes((made / "server/server.key").read_bytes())
    assert command(words) == 2 and "ca.key is not the key of ca.crt" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_run_over_tls_between_machines_started_by_their_own_scripts(tmp_path: Path) -> None:
    """Link, registration, two nodes behind the proxy's rules, a run; from outside, nobody can order anything."""
    lab, port, inner = tmp_path / "lab", free_port(), free_port()
    assert command(["provision", "--nodes", "h0", "h1", "--port", str(port), "--out", str(lab)]) == 0
    config = tmp_path / "run.toml"
    config.write_text(f"overrides = {json.dumps(' '.join([*SETTINGS, f'dir={tmp_path}/run']))}\n")
    submit = [str(lab / "server/flwr.sh"), "run", str(ROOT), "lab", "--run-config", str(config)]
    with Federation(tmp_path / "federation", env=marked(tmp_path), port=inner) as fed:
        inside = fed.environment | {"HOST": "127.0.0.1", "PORT": str(inner)}
        outside = fed.environment | {"PORT": str(port)}
        fed._start("link", ["env", "HOST=127.0.0.1", f"PORT={inner}", str(lab / "server/start.sh")])
        fed.ready("link", scheme="https", limit=LIMIT)
        with gatekeeper(lab / "server", port, inner) as seen:
            assert run(str(lab / "server/register.sh"), env=outside).returncode != 0
            assert run(*submit, env=outside).returncode != 0
            assert seen and {status for _, status in seen} == {403}
            assert run(str(lab / "server/register.sh"), env=inside).returncode == 0
            for name in ("h0", "h1"):
                fed._start(name, ["env", f"PORT={free_port()}", str(lab / name / "start.sh")])
            done = run(*submit, env=inside)
            assert done.returncode == 0, done.stdout + done.stderr
            wait_until(lambda: (tmp_path / "run/summary.json").exists(), LIMIT, "the run")
            assert {"/v1/fleet/pull-messages", "/v1/fleet/get-fab"} <= {
                path for path, status in seen if status == 200
            }
    alone = fedsim.simulate(["engine=serial", *SETTINGS])
    assert (
        hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
        and len(rows(tmp_path / "run")) == 2
    )
    assert {p.name for p in (lab / "h0").iterdir()} == {
        *("ca.crt", "node.key", "node.pub", "node.toml", "start.sh", "compose.yaml"),
        *("state", "flwr", "bin"),  # made at the first start
    }
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")
