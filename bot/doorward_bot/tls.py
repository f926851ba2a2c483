"""TLS to the server: its files, read and judged before anything is sent. Imports `settings` and `errors`."""

import ssl
from pathlib import Path

import grpc

from doorward_bot.errors import BotError
from doorward_bot.settings import Settings


def read_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """What the channel speaks TLS with; None: it does not. Raises BotError."""
    ca_file, cert_file, key_file = (
        settings.doorward_bot_ca_file,
        settings.doorward_bot_cert_file,
        settings.doorward_bot_key_file,
    )
    if ca_file is None:
        return None
    authorities = _read(ca_file, "DOORWARD_BOT_CA_FILE")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
    except ssl.SSLError:
        raise BotError(f"DOORWARD_BOT_CA_FILE: {ca_file} holds no certificate: it has to be PEM") from None
    if cert_file is None or key_file is None:
        return grpc.ssl_channel_credentials(authorities)
    certificate, key = _read(cert_file, "DOORWARD_BOT_CERT_FILE"), _read(key_file, "DOORWARD_BOT_KEY_FILE")
    try:
        # A key with a passphrase is given none, and not asked for at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert_file, key_file, password=lambda: b"")
    except ssl.SSLError:
        raise BotError(
            f"DOORWARD_BOT_CERT_FILE and DOORWARD_BOT_KEY_FILE: {cert_file} and {key_file} have to be a certificate "
            "and the private key that belongs to it, in PEM and without a passphrase"
        ) from None
    return grpc.ssl_channel_credentials(authorities, key, certificate)


def _read(path: Path, variable: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BotError(f"{variable}: cannot read {path}: {error.strerror}") from None
