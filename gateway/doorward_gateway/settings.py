"""The gateway's settings: `[gateway]`, and of `[grpc]` what finds the server. Imports nothing of the project.

They stand in the server's settings file, or in the environment, which wins: `[gateway] port` is
DOORWARD_GATEWAY_PORT.
"""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

PREFIX = "DOORWARD_"
_LAST_PORT = 65535
Port = Annotated[int, Field(ge=1, le=_LAST_PORT)]


class GatewayError(Exception):
    """Something that the operator has to mend; the argument is the sentence that says how."""


def _split(value: object) -> object:
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class GatewaySection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    # Where the public listens.
    host: str = "127.0.0.1"
    port: Port = 8080
    # TLS to the public: PEM files of the certificate with its chain, and of its key; relative to the settings file.
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    # Proxies in front that append to X-Forwarded-For: the client is who connects to the outermost of them.
    trusted_hops: int = Field(0, ge=0, le=16)
    # Envoy's administration, which must never be reachable from outside.
    admin_port: Port = 9901
    # `unix:PATH` or host:port of each server; unset: the Unix socket of each worker in the home.
    upstreams: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    # TLS to servers at host:port: the authorities of their certificates, and the name (a DNS subject
    # alternative name) that these hold.
    upstream_ca_file: Path | None = None
    upstream_name: str | None = Field(None, min_length=1)
    # What the gateway presents to them, so that they know it.
    upstream_cert_file: Path | None = None
    upstream_key_file: Path | None = None
    # Whether servers on other machines may be reached without TLS.
    upstream_allow_plaintext: bool = False
    # Requests per second and client address, with bursts of twice as many. 0 turns the limit off.
    rate_limit: int = Field(100, ge=0, le=1_000_000)
    # How long a request may take, in seconds; longer than any provider's timeout.
    timeout: float = Field(15.0, gt=0, le=3600)
    # Envoy's threads; unset: one a core.
    concurrency: int | None = Field(None, ge=1, le=256)
    # On SIGTERM: seconds of failing the health check while still serving, and then for requests under way.
    drain_wait: float = Field(0.5, ge=0)
    drain_grace: float = Field(3.0, ge=0)


class GrpcSection(BaseModel):
    """What the server also reads."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    port: Port = 50051
    socket: Path | None = None


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
    )

    home: Path
    config: Path
    # How many servers there are on this machine, each with a Unix socket of its own.
    workers: int = Field(1, ge=1, le=64)
    gateway: GatewaySection = GatewaySection()
    grpc: GrpcSection = GrpcSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
            TomlConfigSettingsSource(settings_cls, init_settings()["config"]),
        )

    @model_validator(mode="after")
    def _drains_in_time(self) -> "Settings":
        if self.gateway.drain_wait + self.gateway.drain_grace > 3.5:  # noqa: PLR2004
            raise ValueError("[gateway] drain_wait and drain_grace have to end within 3.5 s together: lower one")
        return self

    @model_validator(mode="after")
    def _has_all_of_its_tls(self) -> "Settings":
        gateway = self.gateway
        for first, second in (
            ("tls_cert_file", "tls_key_file"),
            ("upstream_ca_file", "upstream_name"),
            ("upstream_cert_file", "upstream_key_file"),
        ):
            if (getattr(gateway, first) is None) != (getattr(gateway, second) is None):
                raise ValueError(f"[gateway] {first} and {second} belong together: set both, or none")
        if gateway.upstream_cert_file is not None and gateway.upstream_ca_file is None:
            raise ValueError(
                "[gateway] upstream_cert_file needs TLS to the servers: set upstream_ca_file and upstream_name, too"
            )
        if gateway.upstream_ca_file is not None and any(name.startswith("unix:") for name in self.upstreams):
            raise ValueError(
                "[gateway] upstream_ca_file is for servers at host:port, and TLS is not spoken over a Unix socket: "
                "set upstreams to host:port only, or remove it"
            )
        return self

    def beside(self, path: Path) -> Path:
        """A path of the settings, which is relative to their file."""
        return self.config.parent / path

    @model_validator(mode="after")
    def _workers_have_places(self) -> "Settings":
        if self.workers > 1 and self.grpc.socket is not None:
            raise ValueError(
                "[grpc] socket (or DOORWARD_GRPC_SOCKET) is for one worker, and the sockets of several are named after "
                "their ports: remove it, or set workers to 1"
            )
        if (last := self.grpc.port + self.workers - 1) > _LAST_PORT:
            raise ValueError(
                f"workers ({self.workers}) take as many ports from [grpc] port ({self.grpc.port}) on, and there is no "
                f"port {last}: lower the one or the other"
            )
        return self

    @property
    def upstreams(self) -> tuple[str, ...]:
        if self.gateway.upstreams:
            return self.gateway.upstreams
        if self.grpc.socket:
            return (f"unix:{self.grpc.socket}",)
        return tuple(f"unix:{self.home}/doorward-{self.grpc.port + number}.sock" for number in range(self.workers))


def checkout() -> Path | None:
    """The checkout that this package runs from, if it does."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "envoy.yaml").is_file() else None


def load(home: Path | None = None) -> Settings:
    """Read the settings; GatewayError says which one is wrong."""
    home = (home or Path(os.environ.get("DOORWARD_HOME") or (checkout() or Path.cwd()) / "var")).absolute()
    config = Path(os.environ.get("DOORWARD_CONFIG") or home / "doorward.toml").absolute()
    try:
        return Settings(home=home, config=config)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GatewayError(f"{config} is not valid TOML: {error}") from None
    except (OSError, SettingsError) as error:
        raise GatewayError(f"cannot read the settings: {error}") from None
    except ValidationError as error:
        raise GatewayError("\n".join(_sentence(config, problem) for problem in error.errors())) from None


def _sentence(config: Path, problem: Any) -> str:
    where, what = [str(part) for part in problem["loc"]], problem["msg"]
    if not where:
        return f"{config}: {what.removeprefix('Value error, ')}"
    section, key = where[0], ".".join(where[1:])
    if not key:
        return f"{config}: {section} (or {PREFIX}{section.upper()}): {what}"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, GatewaySection.model_fields, n=1)
        what = "is not a setting" + (f" (did you mean {close[0]}?)" if close else "") + ": mend or remove it"
        return f"{config} (or the environment): [{section}] {key} {what}"
    return f"{config}: [{section}] {key} (or {PREFIX}{'_'.join(where).upper()}): {what}"
