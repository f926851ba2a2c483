"""TLS of the TCP port: its files, read and judged before anything listens. Imports `errors`."""

import ipaddress
import socket
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from doorward_server.errors import OperatorError

# gRPC's TLS has no other signatures: with such a key every handshake would fail.
_CURVES = (ec.SECP256R1, ec.SECP384R1)


@dataclass(frozen=True)
class Pem:
    """A file of certificates in PEM (RFC 7468, section 5), and when the earliest of them ends."""

    path: Path
    text: bytes = field(repr=False)
    expires_at: datetime


@dataclass(frozen=True)
class ServerTls:
    """What the TCP port speaks TLS with. `clients`: the authorities that clients' certificates have to come from."""

    certificate: Pem
    key: bytes = field(repr=False)
    clients: Pem | None


def read_tls(cert_file: Path, key_file: Path, client_ca_file: Path | None) -> ServerTls:
    """Read the files of `[grpc]`. Raises OperatorError."""
    certificate = _read_certificates(cert_file, "[grpc] tls_cert_file")
    key = _read_key(key_file, certificate)
    clients = _read_certificates(client_ca_file, "[grpc] client_ca_file") if client_ca_file else None
    return ServerTls(certificate, key, clients)


def is_loopback(host: str) -> bool:
    """Whether every address of a host is one of this machine alone. Raises OperatorError when it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise OperatorError(f'[grpc] host: "{host}" has no address: set an address of this machine') from None
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def _read_certificates(path: Path, setting: str) -> Pem:
    text = _read(path, setting)
    try:
        certificates = x509.load_pem_x509_certificates(text)
    except ValueError:
        raise OperatorError(
            f"{setting}: {path} holds no certificate: it has to be PEM, from -----BEGIN CERTIFICATE----- on"
        ) from None
    return Pem(path, text, min(certificate.not_valid_after_utc for certificate in certificates))


def _read_key(path: Path, certificate: Pem) -> bytes:
    text = _read(path, "[grpc] tls_key_file")
    try:
        key = load_pem_private_key(text, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise OperatorError(
            f"[grpc] tls_key_file: {path} holds no private key: it has to be PEM, without a passphrase"
        ) from None
    if not isinstance(key, rsa.RSAPrivateKey) and not (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES)
    ):
        raise OperatorError(
            f"[grpc] tls_key_file: {path} holds a key that gRPC speaks no TLS with: make one of RSA, P-256 or P-384"
        )
    if not _is_of(certificate, key):
        raise OperatorError(
            f"[grpc] tls_key_file: {path} is not the key of the first certificate in {certificate.path}: "
            "name the two that belong together"
        )
    return text


def _is_of(certificate: Pem, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bool:
    try:
        return x509.load_pem_x509_certificate(certificate.text).public_key() == key.public_key()
    except (ValueError, UnsupportedAlgorithm):  # a public key of another kind
        return False


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OperatorError(f"{setting}: cannot read {path}: {error.strerror}") from None
