"""TLS as Envoy is told of it, its files checked before: Envoy would say in thirty lines what is wrong.

Imports `settings`.
"""

import ssl
from pathlib import Path
from typing import Any

from doorward_gateway.settings import GatewayError, Settings

_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_OLDEST = {"tls_minimum_protocol_version": "TLSv1_2"}
# Who opens a connection has to speak TLS soon; Envoy itself would wait for ever.
_HANDSHAKE = "10s"


def for_public(settings: Settings) -> dict[str, Any]:
    """What the public listener's filter chain has beside its filters; nothing when it speaks no TLS."""
    gateway = settings.gateway
    if gateway.tls_cert_file is None or gateway.tls_key_file is None:
        return {}
    pair = _pair("tls", settings.beside(gateway.tls_cert_file), settings.beside(gateway.tls_key_file))
    context = {"tls_params": _OLDEST, "alpn_protocols": ["h2", "http/1.1"], "tls_certificates": [pair]}
    return {
        "transport_socket": _transport_socket("DownstreamTlsContext", common_tls_context=context),
        "transport_socket_connect_timeout": _HANDSHAKE,
    }


def for_upstreams(settings: Settings) -> dict[str, Any]:
    """What the servers' cluster has beside their addresses; nothing when they are spoken to in clear."""
    gateway = settings.gateway
    if gateway.upstream_ca_file is None:
        return {}
    context: dict[str, Any] = {
        # Envoy's own choice towards servers ends at 1.2.
        "tls_params": {**_OLDEST, "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": ["h2"],
        "validation_context": {
            "trusted_ca": {"filename": str(_authorities(settings.beside(gateway.upstream_ca_file)))},
            # The name and no other: a trusted authority may have certified many.
            "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": gateway.upstream_name}}],
        },
    }
    if gateway.upstream_cert_file is not None and gateway.upstream_key_file is not None:
        files = settings.beside(gateway.upstream_cert_file), settings.beside(gateway.upstream_key_file)
        context["tls_certificates"] = [_pair("upstream", *files)]
    return {
        "transport_socket": _transport_socket(
            "UpstreamTlsContext", sni=gateway.upstream_name, common_tls_context=context
        )
    }


def _transport_socket(kind: str, **context: Any) -> dict[str, Any]:
    return {"name": "envoy.transport_sockets.tls", "typed_config": {"@type": f"{_TYPE}.{kind}", **context}}


def _pair(prefix: str, cert_file: Path, key_file: Path) -> dict[str, Any]:
    """A certificate and its key, if they are that."""
    cert_setting, key_setting = f"[gateway] {prefix}_cert_file", f"[gateway] {prefix}_key_file"
    _read(cert_file, cert_setting)
    _read(key_file, key_setting)
    try:
        # A key with a passphrase is given none, and not asked for at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise GatewayError(
                f"{key_setting}: {key_file} is not the key of the first certificate in {cert_file}: "
                "name the two that belong together"
            ) from None
        raise GatewayError(
            f"{cert_setting} and {key_setting}: {cert_file} and {key_file} have to be a certificate and its private "
            "key, in PEM and without a passphrase"
        ) from None
    return {"certificate_chain": {"filename": str(cert_file)}, "private_key": {"filename": str(key_file)}}


def _authorities(path: Path) -> Path:
    """A file of certificates, if it is one."""
    _read(path, "[gateway] upstream_ca_file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise GatewayError(
            f"[gateway] upstream_ca_file: {path} holds no certificate: "
            "it has to be PEM, from -----BEGIN CERTIFICATE----- on"
        ) from None
    return path


def _read(path: Path, setting: str) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise GatewayError(f"{setting}: cannot read {path}: {error.strerror}") from None
