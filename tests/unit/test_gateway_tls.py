"""What Envoy is told of TLS and of proxies in front, and what the operator is told of settings that do not fit."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from doorward_gateway import settings as settings_module
from doorward_gateway.config import render
from doorward_gateway.settings import GatewayError
from tests.certificates import GATEWAY, SERVER, Authority

_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_ELSEWHERE = "10.0.0.7:50051"

Render = Callable[..., Any]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture
def rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Render:
    """Renders the configuration of `[gateway]` settings; a home without a file."""

    def call(**variables: str | Path) -> Any:
        for name in [name for name in os.environ if name.startswith("DOORWARD_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(f"DOORWARD_GATEWAY_{name.upper()}", str(value))
        return render(settings_module.load(tmp_path))

    return call


def chain(config: Any) -> Any:
    """The public listener's filter chain."""
    return config["static_resources"]["listeners"][0]["filter_chains"][0]


def cluster(config: Any) -> Any:
    return config["static_resources"]["clusters"][0]


# What is rendered


def test_no_tls(rendered: Render) -> None:
    config = rendered()
    assert "transport_socket" not in chain(config)
    assert "transport_socket" not in cluster(config)
    assert chain(config)["filters"][0]["typed_config"]["xff_num_trusted_hops"] == 0


def test_trusted_hops(rendered: Render) -> None:
    assert chain(rendered(trusted_hops="2"))["filters"][0]["typed_config"]["xff_num_trusted_hops"] == 2


def test_tls_to_the_public(rendered: Render, authority: Authority, tmp_path: Path) -> None:
    """The files stand beside the settings."""
    certificate = authority.issue("doorward.example", through=1)
    certificate.cert_file.rename(tmp_path / "public.pem")
    certificate.key_file.rename(tmp_path / "public.key")
    assert chain(rendered(tls_cert_file="public.pem", tls_key_file="public.key"))["transport_socket"] == {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TYPE}.DownstreamTlsContext",
            "common_tls_context": {
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "alpn_protocols": ["h2", "http/1.1"],
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": f"{tmp_path}/public.pem"},
                        "private_key": {"filename": f"{tmp_path}/public.key"},
                    }
                ],
            },
        },
    }


@pytest.mark.parametrize("presents", [True, False], ids=["with a certificate", "without one"])
def test_tls_to_the_servers(rendered: Render, authority: Authority, presents: bool) -> None:
    certificate = authority.issue(GATEWAY)
    files = {"upstream_cert_file": certificate.cert_file, "upstream_key_file": certificate.key_file}
    config = rendered(
        upstreams=_ELSEWHERE,
        upstream_ca_file=authority.ca_file,
        upstream_name=SERVER,
        **(files if presents else {}),
    )
    context = cluster(config)["transport_socket"]["typed_config"]
    assert (context["@type"], context["sni"]) == (f"{_TYPE}.UpstreamTlsContext", SERVER)
    common = context["common_tls_context"]
    assert common["alpn_protocols"] == ["h2"]
    assert common["validation_context"] == {
        "trusted_ca": {"filename": str(authority.ca_file)},
        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": SERVER}}],
    }
    presented = {
        "certificate_chain": {"filename": str(certificate.cert_file)},
        "private_key": {"filename": str(certificate.key_file)},
    }
    assert common.get("tls_certificates") == ([presented] if presents else None)


@pytest.mark.parametrize(
    "upstreams", ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "localhost:1, LOCALHOST:2", "unix:/a, 127.0.0.1:1"]
)
def test_servers_on_this_machine_need_no_tls(rendered: Render, upstreams: str) -> None:
    assert "transport_socket" not in cluster(rendered(upstreams=upstreams))


_OTHERS = ["10.0.0.7", "0.0.0.0", "server.internal", "localhost.example", "[2001:db8::1]", "[::]"]


@pytest.mark.parametrize("host", _OTHERS)
def test_servers_on_other_machines_do(rendered: Render, host: str) -> None:
    with pytest.raises(GatewayError) as refused:
        rendered(upstreams=f"127.0.0.1:1, {host}:1")
    sentence = str(refused.value)
    assert sentence.startswith(f"[gateway] upstreams: {host.strip('[]')} may be another machine")
    assert "set [gateway] upstream_ca_file and upstream_name, or upstream_allow_plaintext = true" in sentence
    assert "transport_socket" not in cluster(rendered(upstreams=f"{host}:1", upstream_allow_plaintext="true"))


# What is refused

_HALF: dict[str, tuple[Mapping[str, str], str]] = {
    "no key": ({"tls_cert_file": "a"}, "tls_cert_file and tls_key_file belong together"),
    "no certificate": ({"tls_key_file": "a"}, "tls_cert_file and tls_key_file belong together"),
    "no name": ({"upstream_ca_file": "a"}, "upstream_ca_file and upstream_name belong together"),
    "no authorities": ({"upstream_name": "a"}, "upstream_ca_file and upstream_name belong together"),
    "no key for the servers": (
        {"upstream_ca_file": "a", "upstream_name": "a", "upstream_cert_file": "a"},
        "upstream_cert_file and upstream_key_file belong together",
    ),
    "a certificate without TLS": (
        {"upstream_cert_file": "a", "upstream_key_file": "a"},
        "upstream_cert_file needs TLS to the servers: set upstream_ca_file",
    ),
    "the Unix socket": ({"upstream_ca_file": "a", "upstream_name": "a"}, "TLS is not spoken over a Unix socket"),
    "a Unix socket, too": (
        {"upstream_ca_file": "a", "upstream_name": "a", "upstreams": f"{_ELSEWHERE}, unix:/a"},
        "TLS is not spoken over a Unix socket",
    ),
    "hops below none": ({"trusted_hops": "-1"}, "trusted_hops"),
    "too many hops": ({"trusted_hops": "17"}, "trusted_hops"),
}


@pytest.mark.parametrize(("variables", "words"), _HALF.values(), ids=_HALF)
def test_half_a_configuration(rendered: Render, variables: Mapping[str, str], words: str) -> None:
    with pytest.raises(GatewayError) as refused:
        rendered(**variables)
    assert words in str(refused.value)
    assert "[gateway]" in str(refused.value)
    assert "\n" not in str(refused.value)


_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "no certificate": ("tls_cert_file", None, "tls_cert_file: cannot read {path}: No such file"),
    "no key": ("tls_key_file", None, "tls_key_file: cannot read {path}: No such file"),
    "a certificate that is none": (
        "tls_cert_file",
        b"a secret",
        "tls_cert_file and [gateway] tls_key_file: {path} and",
    ),
    "a key that is none": ("tls_key_file", b"a secret", "tls_cert_file and [gateway] tls_key_file: "),
    "no authorities": ("upstream_ca_file", None, "upstream_ca_file: cannot read {path}: No such file"),
    "authorities that are none": ("upstream_ca_file", b"a secret", "upstream_ca_file: {path} holds no certificate"),
    "empty authorities": ("upstream_ca_file", b"", "upstream_ca_file: {path} holds no certificate"),
    "no certificate for the servers": ("upstream_cert_file", None, "upstream_cert_file: cannot read {path}: No such"),
    "a key for the servers that is none": (
        "upstream_key_file",
        b"a secret",
        "upstream_cert_file and [gateway] upstream_key_file: ",
    ),
    "another's key": ("tls_key_file", b"another's", "tls_key_file: {path} is not the key of the first certificate in "),
    "a key with a passphrase": ("tls_key_file", b"a passphrase", "tls_cert_file and [gateway] tls_key_file: "),
}


@pytest.mark.parametrize(("setting", "content", "words"), _FILES.values(), ids=_FILES)
def test_a_wrong_file_is_named(
    rendered: Render, authority: Authority, tmp_path: Path, setting: str, content: bytes | None, words: str
) -> None:
    certificate, path = authority.issue(GATEWAY), tmp_path / "wrong.pem"
    match content:
        case b"another's":
            path.write_bytes(authority.issue(GATEWAY).key_file.read_bytes())
        case b"a passphrase":
            path.write_bytes(certificate.encrypted_key(b"a secret"))
        case bytes():
            path.write_bytes(content)
    files: dict[str, str | Path] = {
        "tls_cert_file": certificate.cert_file,
        "tls_key_file": certificate.key_file,
        "upstream_ca_file": authority.ca_file,
        "upstream_cert_file": certificate.cert_file,
        "upstream_key_file": certificate.key_file,
        setting: path,
    }
    with pytest.raises(GatewayError) as refused:
        rendered(upstreams=_ELSEWHERE, upstream_name=SERVER, **files)
    sentence = str(refused.value)
    assert sentence.startswith(f"[gateway] {words.format(path=path)}")
    assert "\n" not in sentence
    assert "a secret" not in sentence
