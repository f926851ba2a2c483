"""The server's TLS before it listens: its files, addresses that do without it, and what the operator is told."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.errors import OperatorError
from doorward_server.tls import is_loopback, read_tls
from tests.certificates import GATEWAY, SERVER, Authority
from tests.processes import BIN, free_port, running
from tests.unit.command_line import assert_tells, doorward

PRIVATE = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


def in_pem(key: PRIVATE, passphrase: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


# Files


@pytest.mark.parametrize("through", [0, 2], ids=["alone", "with its chain"])
def test_files_as_they_should_be(authority: Authority, through: int) -> None:
    certificate = authority.issue(SERVER, not_after=datetime(2040, 1, 2, tzinfo=UTC), through=through)
    tls = read_tls(certificate.cert_file, certificate.key_file, authority.ca_file)
    assert tls.certificate.text == certificate.cert_file.read_bytes()
    assert tls.certificate.expires_at == datetime(2040, 1, 2, tzinfo=UTC)
    assert tls.key == certificate.key_file.read_bytes()
    assert tls.clients is not None
    assert tls.clients.text == authority.ca_file.read_bytes()
    assert "PRIVATE" not in repr(tls)
    assert read_tls(certificate.cert_file, certificate.key_file, None).clients is None


WRONG: dict[str, tuple[str, bytes | None, str]] = {
    "no certificate": ("cert", None, "[grpc] tls_cert_file: cannot read {path}: No such file"),
    "an empty certificate": ("cert", b"", "[grpc] tls_cert_file: {path} holds no certificate"),
    "a certificate that is none": ("cert", b"a secret", "[grpc] tls_cert_file: {path} holds no certificate"),
    "a broken certificate": (
        "cert",
        b"-----BEGIN CERTIFICATE-----\nYSBzZWNyZXQ=\n-----END CERTIFICATE-----\n",
        "[grpc] tls_cert_file: {path} holds no certificate",
    ),
    "a key for a certificate": (
        "cert",
        in_pem(ec.generate_private_key(ec.SECP256R1())),
        "[grpc] tls_cert_file: {path} holds no certificate",
    ),
    "no key": ("key", None, "[grpc] tls_key_file: cannot read {path}: No such file"),
    "an empty key": ("key", b"", "[grpc] tls_key_file: {path} holds no private key"),
    "a key that is none": ("key", b"a secret", "[grpc] tls_key_file: {path} holds no private key"),
    "a key with a passphrase": (
        "key",
        in_pem(ec.generate_private_key(ec.SECP256R1()), b"a secret"),
        "[grpc] tls_key_file: {path} holds no private key: it has to be PEM, without a passphrase",
    ),
    "another's key": (
        "key",
        in_pem(ec.generate_private_key(ec.SECP256R1())),
        "[grpc] tls_key_file: {path} is not the key of the first certificate in ",
    ),
    "another's key, of another kind": (
        "key",
        in_pem(rsa.generate_private_key(65537, 2048)),
        "[grpc] tls_key_file: {path} is not the key of the first certificate in ",
    ),
    "a key of Ed25519": (
        "key",
        in_pem(ed25519.Ed25519PrivateKey.generate()),
        "[grpc] tls_key_file: {path} holds a key that gRPC speaks no TLS with: make one of RSA, P-256 or P-384",
    ),
    "a key of P-521": (
        "key",
        in_pem(ec.generate_private_key(ec.SECP521R1())),
        "[grpc] tls_key_file: {path} holds a key that gRPC speaks no TLS with: make one of RSA, P-256 or P-384",
    ),
    "no authorities": ("clients", None, "[grpc] client_ca_file: cannot read {path}: No such file"),
    "authorities that are none": ("clients", b"a secret", "[grpc] client_ca_file: {path} holds no certificate"),
}


@pytest.mark.parametrize(("which", "content", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_named(
    authority: Authority, tmp_path: Path, which: str, content: bytes | None, words: str
) -> None:
    certificate, path = authority.issue(SERVER), tmp_path / "wrong.pem"
    if content is not None:
        path.write_bytes(content)
    files = {"cert": certificate.cert_file, "key": certificate.key_file, "clients": authority.ca_file, which: path}
    with pytest.raises(OperatorError) as refused:
        read_tls(files["cert"], files["key"], files["clients"])
    sentence = str(refused.value)
    assert sentence.startswith(words.format(path=path))
    assert "\n" not in sentence
    assert "a secret" not in sentence


def test_a_folder_is_named(authority: Authority, tmp_path: Path) -> None:
    certificate = authority.issue(SERVER)
    with pytest.raises(OperatorError, match=r"tls_key_file: cannot read .*: Is a directory"):
        read_tls(certificate.cert_file, tmp_path, None)


@pytest.mark.parametrize("old", ["certificate", "authority", None])
def test_what_has_expired_is_a_warning(
    authority: Authority, home: Path, capfd: pytest.CaptureFixture[str], old: str | None
) -> None:
    """Of a file that stands beside the settings, as files do."""
    then = datetime(2020, 1, 1, tzinfo=UTC)
    certificate = authority.issue(SERVER, not_after=then if old == "certificate" else None)
    certificate.cert_file.rename(home / "server.pem")
    certificate.key_file.rename(home / "server.key")
    clients = authority.issue(GATEWAY, not_after=then if old == "authority" else None)
    clients.cert_file.rename(home / "clients.pem")
    (home / "doorward.toml").write_text(
        "[grpc]\ntls_cert_file = 'server.pem'\ntls_key_file = 'server.key'\nclient_ca_file = 'clients.pem'\n"
    )
    assert App(settings_module.load(home)).tls is not None
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    names = {"certificate": "server.pem", "authority": "clients.pem"}
    assert [(line["event"], line["level"], line["file"], line["expired_at"]) for line in lines] == (
        [("certificate has expired", "warning", str(home / names[old]), "2020-01-01T00:00:00+00:00")] if old else []
    )


# Addresses


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("127.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
    ],
)
def test_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# The last would be a Unix socket to gRPC, and whoever reaches it the gateway.
@pytest.mark.parametrize(
    "host", ["", "no-such-name.invalid", "a..b", "[::1]", "256.0.0.1", "ipv4:0.0.0.0", "unix:/tmp/x"]
)
def test_a_host_without_an_address(host: str) -> None:
    with pytest.raises(OperatorError) as refused:
        is_loopback(host)
    assert str(refused.value).startswith(f'[grpc] host: "{host}" has no address: set')


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        pytest.param(
            {"HOST": "0.0.0.0"}, ("[grpc] host: 0.0.0.0", "tls_cert_file", "allow_plaintext = true"), id="all"
        ),
        pytest.param({"HOST": "::"}, ("[grpc] host: ::", "tls_cert_file", "allow_plaintext = true"), id="all, IPv6"),
        pytest.param({"HOST": "unix:x", "ALLOW_PLAINTEXT": "true"}, ('"unix:x" has no address',), id="no address"),
        pytest.param(
            {"TLS_CERT_FILE": "a.pem", "TLS_KEY_FILE": "a.key"},
            ("tls_cert_file: cannot read", "home/a.pem"),
            id="no file",
        ),
    ],
)
def test_a_server_that_does_not_start(home: Path, variables: dict[str, str], parts: tuple[str, ...]) -> None:
    environment = {f"DOORWARD_GRPC_{name}": value for name, value in variables.items()}
    done = doorward(home, "serve", environment={"DOORWARD_GRPC_PORT": str(free_port()), **environment})
    assert_tells(done, *parts)


@pytest.mark.parametrize("variables", [{"HOST": "localhost"}, {"HOST": "0.0.0.0", "ALLOW_PLAINTEXT": "true"}], ids=str)
def test_a_server_that_starts_without_tls(home: Path, tmp_path: Path, variables: dict[str, str]) -> None:
    environment = {f"DOORWARD_GRPC_{name}": value for name, value in variables.items()}
    environment |= {"DOORWARD_HOME": str(home), "DOORWARD_GRPC_PORT": str(free_port()), "DOORWARD_GRPC_DRAIN_WAIT": "0"}
    with running([BIN / "doorward", "serve"], tmp_path / "server.log", environment) as process:
        process.await_output('"serving"')
