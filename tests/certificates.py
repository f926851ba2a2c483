"""Throw-away certificates for tests.

`python -m tests.certificates COMMAND...` runs a command with the settings of a gateway that has TLS on both sides.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

# What the certificates of a server and of a gateway are for.
SERVER, GATEWAY = "server.doorward.test", "gateway.doorward.test"


@dataclass(frozen=True)
class Certificate:
    """The files of a certificate with its chain, and of its key."""

    cert_file: Path
    key_file: Path

    def encrypted_key(self, passphrase: bytes) -> bytes:
        """The key as it is with a passphrase."""
        key = serialization.load_pem_private_key(self.key_file.read_bytes(), None)
        encryption = serialization.BestAvailableEncryption(passphrase)
        return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


class Authority:
    """A certificate authority, whose files lie in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._ca = trustme.CA()
        self._issued = 0
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._ca.cert_pem.bytes())

    def issue(
        self, *names: str, common_name: str | None = None, not_after: datetime | None = None, through: int = 0
    ) -> Certificate:
        """A certificate for names, addresses and e-mail addresses; `through` so many intermediate authorities."""
        authority = self._ca
        for _ in range(through):
            authority = authority.create_child_ca()
        made = authority.issue_cert(*names, common_name=common_name, not_after=not_after)
        return self._write(b"".join(pem.bytes() for pem in made.cert_chain_pems), made.private_key_pem.bytes())

    def issue_for(self, *names: x509.GeneralName, self_signed: bool = False) -> Certificate:
        """A certificate for names of any kind."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes()).subject
        issuer_key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
        if self_signed:
            issuer, issuer_key = x509.Name([]), key
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .sign(issuer_key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self._write(made.public_bytes(serialization.Encoding.PEM), private)

    def _write(self, certificates: bytes, key: bytes) -> Certificate:
        self._issued += 1
        files = Certificate(self._folder / f"{self._issued}.pem", self._folder / f"{self._issued}.key")
        files.cert_file.write_bytes(certificates)
        files.key_file.write_bytes(key)
        return files

    def credentials(self, certificate: Certificate | None = None) -> grpc.ChannelCredentials:
        """How a client trusts this authority, and presents a certificate."""
        if certificate is None:
            return grpc.ssl_channel_credentials(self.ca_file.read_bytes())
        key, chain = certificate.key_file.read_bytes(), certificate.cert_file.read_bytes()
        return grpc.ssl_channel_credentials(self.ca_file.read_bytes(), key, chain)


def public_tls(certificate: Certificate) -> dict[str, str]:
    """The variables of a gateway that speaks TLS to the public."""
    return {
        "DOORWARD_GATEWAY_TLS_CERT_FILE": str(certificate.cert_file),
        "DOORWARD_GATEWAY_TLS_KEY_FILE": str(certificate.key_file),
    }


def upstream_tls(authority: Authority, certificate: Certificate | None, name: str = SERVER) -> dict[str, str]:
    """The variables of a gateway that speaks TLS to its servers, and presents a certificate."""
    trust = {"DOORWARD_GATEWAY_UPSTREAM_CA_FILE": str(authority.ca_file), "DOORWARD_GATEWAY_UPSTREAM_NAME": name}
    if certificate is None:
        return trust
    return trust | {
        "DOORWARD_GATEWAY_UPSTREAM_CERT_FILE": str(certificate.cert_file),
        "DOORWARD_GATEWAY_UPSTREAM_KEY_FILE": str(certificate.key_file),
    }


def main() -> None:
    """Run the command that stands in the arguments, and end with its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder) / "authority")
        tls = public_tls(authority.issue("localhost")) | upstream_tls(authority, authority.issue(GATEWAY))
        environment = {**os.environ, **tls, "DOORWARD_GATEWAY_UPSTREAMS": "server.doorward.test:50051"}
        sys.exit(subprocess.run(sys.argv[1:], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
