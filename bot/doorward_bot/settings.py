"""The bot's settings, all from the environment. Imports only `errors`."""

import ipaddress
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from doorward_bot.errors import BotError

_MISSING = {
    "DISCORD_TOKEN": "the bot's token of Discord's developer portal",
    "DOORWARD_BOT_TOKEN": "a service token: `doorward token create --role bot` makes one",
}


class Settings(BaseSettings):
    """Each is read from the environment variable of its name, in capitals."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    # The token of the bot's account; or DISCORD_TOKEN_FILE, a file that holds it.
    discord_token: SecretStr
    # Where Discord's API is; plain http, which shows the token, only on this machine.
    discord_api_base: str = "https://discord.com/api/v10"
    # A service token of role `bot`; or DOORWARD_BOT_TOKEN_FILE, a file that holds it.
    doorward_bot_token: SecretStr
    # The server's gRPC port, as host:port; unset: on this machine, at DOORWARD_GRPC_PORT.
    doorward_bot_server: str = ""
    doorward_grpc_port: int = Field(50051, ge=1, le=65535)
    # TLS to the server: a PEM file of the authorities that its certificate has to come from, with the host's name.
    doorward_bot_ca_file: Path | None = None
    # What the bot presents to a server that asks for a certificate: PEM files of one and of its key.
    doorward_bot_cert_file: Path | None = None
    doorward_bot_key_file: Path | None = None
    # Whether a server on another machine may be called without TLS, which shows the service token and users' keys.
    doorward_bot_allow_plaintext: bool = False
    # Where GET /healthz tells whether Discord and the server are reached, and GET /metrics is for Prometheus; on this
    # machine; 0: nowhere.
    doorward_bot_health_port: int = Field(0, ge=0, le=65535)
    doorward_log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("discord_token", "doorward_bot_token")
    @classmethod
    def _check_token(cls, token: SecretStr) -> SecretStr:
        value = token.get_secret_value().strip()
        if not re.fullmatch("[!-~]+", value):  # no header holds anything else
            raise ValueError("a token is made of visible ASCII characters, without blanks: this is none")
        return SecretStr(value)

    @field_validator("discord_api_base")
    @classmethod
    def _check_base(cls, url: str) -> str:
        parts = _split(url)
        if parts is None or parts.scheme not in {"http", "https"} or parts.query or parts.fragment:
            raise ValueError("it has to be an absolute URL, such as https://discord.com/api/v10")
        if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            raise ValueError("the token would go there in clear: use https; plain http is for this machine only")
        return url.rstrip("/")

    @field_validator("doorward_bot_server")
    @classmethod
    def _check_server(cls, server: str) -> str:
        parts = _split(f"//{server}")
        if server and (parts is None or not parts.port or parts.netloc != server):
            raise ValueError("it has to be host:port, such as 127.0.0.1:50051")
        return server

    @model_validator(mode="after")
    def _calls_in_safety(self) -> "Settings":
        if (self.doorward_bot_cert_file is None) != (self.doorward_bot_key_file is None):
            raise ValueError("DOORWARD_BOT_CERT_FILE and DOORWARD_BOT_KEY_FILE belong together: set both, or none")
        if self.doorward_bot_ca_file is not None:
            return self
        if self.doorward_bot_cert_file is not None:
            raise ValueError(
                "DOORWARD_BOT_CERT_FILE needs TLS: set DOORWARD_BOT_CA_FILE, the authorities of the server's one, too"
            )
        if not self.doorward_bot_allow_plaintext and not _is_loopback(urlsplit(f"//{self.server}").hostname or ""):
            raise ValueError(
                f"DOORWARD_BOT_SERVER: {self.server} may be another machine, and the token and users' keys would go "
                "there in clear: set DOORWARD_BOT_CA_FILE, or DOORWARD_BOT_ALLOW_PLAINTEXT=true if the network is "
                "your own"
            )
        return self

    @property
    def server(self) -> str:
        """The server's address."""
        return self.doorward_bot_server or f"127.0.0.1:{self.doorward_grpc_port}"


def _split(url: str) -> SplitResult | None:
    """The parts of a URL with a host and, if any, a port, and without a user; None when it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts if parts.hostname and "@" not in parts.netloc and not re.search(r"\s", url) else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load(environment: dict[str, str]) -> Settings:
    """Raises BotError."""
    files = {name: _read(f"{name}_FILE", path) for name in _MISSING if (path := environment.get(f"{name}_FILE"))}
    for name in files:
        if environment.get(name):
            raise BotError(f"{name} and {name}_FILE are both set: unset one of them")
    given: dict[str, Any] = {name.lower(): value for name, value in files.items()}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise BotError(what) from None
        name = str(first["loc"][0]).upper()
        if first["type"] == "missing":
            raise BotError(f"{name} is not set: it is {_MISSING[name]}") from None
        raise BotError(f"{name}: {what}") from None


def _read(variable: str, path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise BotError(f"{variable}: cannot read {path}: {reason}") from None
    if not text:
        raise BotError(f"{variable}: {path} is empty: it has to hold a token")
    return text
