"""Keys and certificates of a federation: an authority, its server, and the keys by which nodes are known.

All are elliptic keys on P-384, which Flower takes for nodes. Certificates carry what strict verifiers ask for: basic
constraints, key usage, identifiers of subject and authority.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsim.errors import ConfigError

Key = ec.EllipticCurvePrivateKey
YEARS = datetime.timedelta(days=3650)  # of the authority; a server's certificate is renewed long before
SKEW = datetime.timedelta(hours=1)  # clocks of other machines may be behind


@dataclass(frozen=True)
class Authority:
    """A key that signs, and its certificate."""

    key: Key
    certificate: x509.Certificate

    @staticmethod
    def new(name: str) -> Authority:
        """An authority of its own, which signs servers and no further authorities."""
        key = new_key()
        usage = _usage(key_cert_sign=True, crl_sign=True)
        built = _builder(name, name, key, YEARS).add_extension(x509.BasicConstraints(True, 0), critical=True)
        built = built.add_extension(usage, critical=True).add_extension(_identifier(key), critical=False)
        return Authority(key, built.sign(key, hashes.SHA384()))

    @staticmethod
    def read(folder: Path) -> Authority:
        """One that was made before: ``ca.key`` and ``ca.crt`` in ``folder``.

        Raises:
            ConfigError: the files are not there, are none, or do not belong together.
        """
        try:
            key = forms.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{folder}: no ca.key and ca.crt of an authority there ({error})") from None
        if not isinstance(key, Key) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{folder}: ca.key is not the key of ca.crt")
        return Authority(key, certificate)

    def server(self, name: str, hosts: Sequence[str], days: int) -> tuple[Key, x509.Certificate]:
        """Key and certificate of a server that is reached under ``hosts``, names or addresses, for ``days``.

        Raises:
            ConfigError: the authority's own certificate ends before that.
        """
        end = self.certificate.not_valid_after_utc
        left = end - datetime.datetime.now(datetime.UTC)
        if days > left.days + 1:
            raise ConfigError(
                f"--days {days}: the authority's own certificate ends on {end:%Y-%m-%d}, and no node would take this "
                "one after that; give fewer, or make a new authority"
            )
        key, issuer = new_key(), self.certificate.subject.rfc4514_string().removeprefix("CN=")
        built = _builder(name, issuer, key, datetime.timedelta(days=days))
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        for extension, critical in (
            (x509.BasicConstraints(False, None), True),
            (_usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectAlternativeName([_host(h) for h in hosts]), False),
            (_identifier(key), False),
            (authority, False),
        ):
            built = built.add_extension(extension, critical=critical)
        return key, built.sign(self.key, hashes.SHA384())


def new_key() -> Key:
    """A private key on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def pem(thing: Key | x509.Certificate) -> bytes:
    """A certificate, or an unencrypted private key, as OpenSSL and Flower's server read it."""
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(forms.Encoding.PEM)
    return thing.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())


def openssh(key: Key) -> bytes:
    """A private key as ``ssh-keygen`` writes it, and as Flower's nodes read it."""
    return key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption())


def public_line(key: Key, name: str) -> str:
    """The public half on one line: kind, base64, and whose it is."""
    public = key.public_key().public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH)
    return f"{public.decode()} {name}"


def readable_line(line: str) -> bool:
    """Whether it is a public key by which Flower knows a node: OpenSSH, on a NIST curve."""
    try:
        key = forms.load_ssh_public_key(line.encode())
    except Exception:  # whatever the library raises: it is none
        return False
    return isinstance(key, ec.EllipticCurvePublicKey)


def _builder(name: str, issuer: str, key: Key, long: datetime.timedelta) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, issuer))
    built = x509.CertificateBuilder(subject_name=subject, issuer_name=by, public_key=key.public_key())
    built = built.serial_number(x509.random_serial_number())
    return built.not_valid_before(now - SKEW).not_valid_after(now + long)


def _identifier(key: Key) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _usage(
    digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
