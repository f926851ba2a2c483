"""Every setting, documented beside its default; the only reader of the environment.

Settings come from a TOML file and from the environment, which wins: `[grpc] port` is
`DOORWARD_GRPC_PORT`. Imports `providers`, `validators` and `errors`.
"""

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from doorward_server.errors import OperatorError
from doorward_server.providers import HttpUrl, Provider
from doorward_server.validators import Validator

PREFIX = "DOORWARD_"
# Variables that are not judged by name: other programs' (the launcher, the bot, the stand-ins of
# `make up`) and those whose names the operator chooses.
_OPEN = tuple(f"{PREFIX}{name}_" for name in ("GATEWAY", "BOT", "SANDBOX"))
# Read by one command only: the secret of a provider that is added.
CLIENT_SECRET_VARIABLE = f"{PREFIX}CLIENT_SECRET"
# The longest path that a Unix socket's address holds (sun_path, less its final NUL).
_SOCKET_PATH_BYTES = 107

# A host's name (RFC 1123, section 2.1), which neither an address nor a wildcard is.
_DNS_NAME = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.)*(?=[0-9-]*[A-Za-z])[A-Za-z0-9-]{1,63}")
_HOUR = 3600.0
_LAST_PORT = 65535
_TEN_YEARS = 10 * 365 * 86400.0


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("it has to be a number")  # noqa: TRY004 - what pydantic expects
    return value


Port = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=_LAST_PORT)]
Seconds = Annotated[float, Field(gt=0, le=_TEN_YEARS, allow_inf_nan=False)]
# 0 stands for something else, as each setting says.
SecondsOrNone = Annotated[float, Field(ge=0, le=_TEN_YEARS, allow_inf_nan=False)]


def _split(value: object) -> object:
    """A list may be written as `a, b` in the environment."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


Listed = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


# Sections of sections: [providers.ID] and [validators.SERVICE].
_NAMED: dict[str, type[BaseModel]] = {"providers": Provider, "validators": Validator}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatabaseSection(Section):
    # `sqlite:///` and an absolute path, or `postgresql://...`; unset: doorward.db in the home.
    url: str | None = None
    # How long a write waits for another process's, in seconds.
    busy_timeout: Seconds = 5.0
    # Connections of one process to PostgreSQL at most, but for the one that listens.
    connections: int = Field(16, ge=2, le=1000)


class GrpcSection(Section):
    # The TCP port, for service tokens, and for a gateway that `gateway_name` tells.
    host: str = "127.0.0.1"
    port: Port = 50051
    # TLS of that port: PEM files of the certificate with its chain, and of its key; relative to the settings file.
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    # Mutual TLS: every client of that port has to present a certificate of the authorities in this PEM file.
    client_ca_file: Path | None = None
    # Names, DNS subject alternative names, of the gateway's certificate: who presents one of them is the gateway.
    gateway_name: Listed = ()
    # Whether that port may be reached from other machines without TLS.
    allow_plaintext: bool = False
    # The Unix socket of the gateway; unset: doorward-PORT.sock in the home.
    socket: Path | None = None
    # Calls served at once; the rest waits.
    threads: int = Field(64, ge=2, le=1024)
    # Calls taken in at once, waiting ones too; more than one gateway sends (1000).
    # Beyond it gRPC itself answers RESOURCE_EXHAUSTED.
    max_concurrent_rpcs: int = Field(1024, ge=2)
    # Server reflection, so that grpcurl works without the protos.
    reflection: bool = False
    # On SIGTERM: seconds between telling the gateway and refusing calls, and for calls under way.
    drain_wait: float = Field(1.5, ge=0)
    drain_grace: float = Field(2.0, ge=0)


class GatewaySection(Section):
    """What the server has to know of the gateway; the launcher reads the rest."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    port: Port = 8080
    # The certificate of the gateway's own TLS, if it speaks it.
    tls_cert_file: Path | None = None
    # How long the gateway waits for an answer, in seconds.
    timeout: Seconds = 15.0


class LogSection(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    # One line per call.
    access: bool = True


class MetricsSection(Section):
    """Where Prometheus reads the metrics: GET /metrics."""

    # Whoever reaches it reads it: keep it to this machine, or to a network of your own.
    host: str = "127.0.0.1"
    # Unset: nowhere. Each process needs a port of its own.
    port: Port | None = None


class OutboundSection(Section):
    """Requests to providers."""

    # ip:port pairs that may be connected to although they are not global unicast addresses.
    allow: Listed = ()
    # Requests under way at once, in all and per provider; more are refused with BUSY.
    concurrency: int = Field(48, ge=1)
    per_provider: int = Field(32, ge=1)
    # Calls that wait for another call's exchange or refresh; more are refused with BUSY.
    waiting: int = Field(48, ge=1)
    # A PEM file with certificate authorities to trust beside the public ones.
    ca_file: Path | None = None


class RefreshSection(Section):
    # How long one refresh may take before another process may try; longer than any provider's timeout.
    lease: Seconds = 10.0
    # Seconds before a token runs out at which it is refreshed unasked, and up to how many more, at random for each;
    # never in the first half of its life, nor one that lives for less than two leases. `ahead` 0: only when asked for.
    ahead: SecondsOrNone = 300.0
    jitter: SecondsOrNone = 60.0
    # Seconds between looks for tokens that are due.
    poll: Seconds = 5.0
    # Such refreshes under way at once in a process; half of them at one provider.
    at_once: int = Field(8, ge=1, le=64)


class SessionsSection(Section):
    # Seconds that a session lives: one year.
    lifetime: Seconds = 365 * 86400.0


class JobsSection(Section):
    # Seconds between attempts; after the last one the job is abandoned.
    schedule: Annotated[tuple[Seconds, ...], NoDecode, BeforeValidator(_split)] = (
        5,
        30,
        120,
        600,
        3600,
        6 * 3600,
        24 * 3600,
    )
    # A claimed job belongs to its worker for so long; longer than any provider's timeout.
    lease: Seconds = 60.0
    # Seconds between looks for jobs that another process has queued.
    poll: Seconds = 0.5
    threads: int = Field(16, ge=1, le=64)


class LimitsSection(Section):
    """What one caller may do; 0: no limit."""

    # Failed log-ins and wrong Basic credentials a minute, per client id and address.
    auth_failures: int = Field(30, ge=0)
    # Prompts that wait for one user's answer: of strangers, and as many again of registered applications.
    open_per_user: int = Field(3, ge=0)
    # Requests for keys an hour.
    requests_per_address: int = Field(600, ge=0)
    requests_per_application: int = Field(120, ge=0)


class ConsentsSection(Section):
    """Requests for users' keys."""

    # Seconds that a user has to answer.
    timeout: Seconds = 600.0
    # Whether applications that are not registered may ask.
    allow_unregistered: bool = True


class CallbacksSection(Section):
    """Deliveries to applications."""

    # ip:port pairs that may be connected to although they are not global unicast addresses.
    allow: Listed = ()
    # Seconds between attempts, each made longer by up to a tenth; after the last one a delivery is abandoned.
    schedule: Annotated[tuple[Seconds, ...], NoDecode, BeforeValidator(_split)] = (
        5,
        300,
        1800,
        7200,
        18000,
        36000,
        36000,
    )
    # Seconds for a whole attempt, and for connecting.
    timeout: Seconds = 15.0
    connect_timeout: Seconds = 5.0
    # Deliveries to one host at once.
    per_host: int = Field(4, ge=1)


class RetentionSection(Section):
    """How many seconds what is over is kept; 0: for ever."""

    # Requests for keys, after their outcome; at least as long as deliveries. One with a grant that the user has not
    # revoked stays for the sake of that.
    requests: SecondsOrNone = 90 * 86400.0
    # Such a grant goes with its request all the same when it is so old: the user does not see it any more.
    grants: SecondsOrNone = 0.0
    # Deliveries and their attempts, after they were sent or abandoned.
    deliveries: SecondsOrNone = 30 * 86400.0
    # Sessions, after they expired.
    sessions: SecondsOrNone = 86400.0
    # Jobs, after they were abandoned.
    jobs: SecondsOrNone = 30 * 86400.0
    # Seconds between looks for what is over, and how many rows are removed in one transaction.
    every: Seconds = 3600.0
    batch: int = Field(200, ge=1, le=10_000)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    # Where the state lives. In the environment only.
    home: Path
    # The settings file. In the environment only.
    config: Path
    # The master key itself, or the file that holds it (unset: master.key in the home). What runs follows the file.
    master_key: SecretStr | None = None
    master_key_file: Path | None = None
    # Where browsers find the gateway (unset: its own address), and the other origins that may call it.
    public_url: HttpUrl | None = None
    allowed_origins: Annotated[tuple[HttpUrl, ...], NoDecode, BeforeValidator(_split)] = ()
    # Server processes, on as many TCP ports from [grpc] port on, each with the Unix socket of its port.
    workers: int = Field(1, ge=1, le=64)

    database: DatabaseSection = DatabaseSection()
    grpc: GrpcSection = GrpcSection()
    gateway: GatewaySection = GatewaySection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()
    outbound: OutboundSection = OutboundSection()
    refresh: RefreshSection = RefreshSection()
    sessions: SessionsSection = SessionsSection()
    jobs: JobsSection = JobsSection()
    limits: LimitsSection = LimitsSection()
    providers: dict[str, Provider] = {}
    validators: dict[str, Validator] = {}
    consents: ConsentsSection = ConsentsSection()
    callbacks: CallbacksSection = CallbacksSection()
    retention: RetentionSection = RetentionSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        config: Path = init_settings()["config"]
        file = TomlConfigSettingsSource(settings_cls, config)
        for name in ("home", "config"):
            if name in file.toml_data:
                raise OperatorError(
                    f"{config}: {name} cannot be set in the file: remove it, and set {PREFIX}{name.upper()}"
                )
        return init_settings, env_settings, file

    @model_validator(mode="before")
    @classmethod
    def _name_sections(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Tell each provider and each validator its name."""
        named = {}
        for kind, name in (("providers", "id"), ("validators", "service")):
            if isinstance(sections := values.get(kind), dict):
                named[kind] = {
                    key: {**section, name: key} if isinstance(section, dict) else section
                    for key, section in sections.items()
                }
        return {**values, **named}

    @model_validator(mode="after")
    def _is_consistent(self) -> "Settings":
        for provider in self.providers.values():
            self.check_timeouts(provider)
        # A claimed job may wait for one before it.
        if 2 * self.callbacks.timeout >= self.jobs.lease:
            raise ValueError(
                f"[callbacks] timeout ({self.callbacks.timeout:g} s) has to be shorter than half of [jobs] lease "
                f"({self.jobs.lease:g} s): lower the one or raise the other"
            )
        self._check_refresh()
        self._check_retention()
        if self.grpc.drain_wait + self.grpc.drain_grace > 4:  # noqa: PLR2004
            raise ValueError("[grpc] drain_wait and drain_grace have to end within 4 s together: lower one")
        self._check_tls()
        self._check_metrics()
        if not self.database_url.startswith(("sqlite:////", "postgresql://")):
            raise ValueError(
                "[database] url (or DOORWARD_DATABASE_URL) has to be sqlite:/// and an absolute path, "
                "such as sqlite:////var/lib/doorward/doorward.db, or postgresql://USER:PASSWORD@HOST/DATABASE"
            )
        return self

    @model_validator(mode="after")
    def _workers_have_places(self) -> "Settings":
        if self.workers > 1 and self.grpc.socket is not None:
            raise ValueError(
                "[grpc] socket (or DOORWARD_GRPC_SOCKET) is for one worker, and the sockets of several are named after "
                "their ports: remove it, or set workers to 1"
            )
        last = self.ports[-1]
        if last > _LAST_PORT:
            raise ValueError(
                f"workers ({self.workers}) take as many ports from [grpc] port ({self.grpc.port}) on, and there is no "
                f"port {last}: lower the one or the other"
            )
        if len(os.fsencode(self.socket_at(last))) > _SOCKET_PATH_BYTES:
            mend = "set [grpc] socket (DOORWARD_GRPC_SOCKET) to a shorter one"
            raise ValueError(
                f"the path of the Unix socket, {self.socket_at(last)}, is longer than {_SOCKET_PATH_BYTES} bytes: "
                + (mend if self.workers == 1 else "choose a home with a shorter path")
            )
        return self

    def _check_metrics(self) -> None:
        if self.metrics.port is None:
            return
        ours = range(self.metrics.port, self.metrics.port + self.workers)
        for name, ports in (("grpc", self.ports), ("gateway", (self.gateway.port,))):
            if taken := sorted({*ours} & {*ports}):
                raise ValueError(
                    f"[metrics] port (DOORWARD_METRICS_PORT) is that of [{name}], {taken[0]}"
                    + (f" (each of {self.workers} workers has one)" if self.workers > 1 else "")
                    + ": choose another one"
                )
        if ours[-1] > _LAST_PORT:
            raise ValueError(f"[metrics] port and workers ask for a port {ours[-1]}, which there is not: lower one")

    def _check_tls(self) -> None:
        grpc = self.grpc
        if (grpc.tls_cert_file is None) != (grpc.tls_key_file is None):
            raise ValueError("[grpc] tls_cert_file and tls_key_file belong together: set both, or none")
        if grpc.client_ca_file is not None and grpc.tls_cert_file is None:
            raise ValueError(
                "[grpc] client_ca_file needs TLS, for clients present their certificates in it: "
                "set tls_cert_file and tls_key_file, too"
            )
        if grpc.gateway_name and grpc.client_ca_file is None:
            raise ValueError(
                "[grpc] gateway_name needs client_ca_file, the authorities of the gateway's certificate: set it, too"
            )
        for name in grpc.gateway_name:
            if not _DNS_NAME.fullmatch(name):
                raise ValueError(
                    f'[grpc] gateway_name: "{name}" is not a DNS name: write the whole name, without a wildcard, '
                    "that the gateway's certificate holds"
                )

    def _check_refresh(self) -> None:
        refresh = self.refresh
        if not refresh.ahead:
            return
        # So long it may take until another process does what one that died had begun.
        takeover = 2 * refresh.lease + refresh.poll
        if refresh.ahead <= takeover:
            raise ValueError(
                f"[refresh] ahead ({refresh.ahead:g} s) has to be 0, or longer than two leases and a poll "
                f"({takeover:g} s): raise it, or lower [refresh] lease or poll"
            )
        if refresh.at_once > self.outbound.concurrency:
            raise ValueError(
                f"[refresh] at_once ({refresh.at_once}) has to be at most [outbound] concurrency "
                f"({self.outbound.concurrency}): lower the one or raise the other"
            )

    def _check_retention(self) -> None:
        kept = self.retention
        for name, seconds in (("requests", kept.requests), ("deliveries", kept.deliveries)):
            # The limits count the requests of an hour, and an attempt may be late.
            if 0 < seconds < _HOUR:
                raise ValueError(f"[retention] {name} ({seconds:g} s) has to be 0 or at least {_HOUR:g} s: raise it")
        if kept.requests and not 0 < kept.deliveries <= kept.requests:
            deliveries = f"{kept.deliveries:.0f} s" if kept.deliveries else "for ever"
            raise ValueError(
                f"[retention] requests ({kept.requests:.0f} s) cannot be shorter than deliveries ({deliveries}), for a "
                "delivery tells of its request: raise the one or lower the other"
            )
        if kept.grants and not kept.requests:
            raise ValueError(
                "[retention] grants has no effect while requests are kept for ever: set requests, too, or remove it"
            )

    def check_timeouts(self, provider: Provider) -> None:
        """Raise ValueError when a provider may take longer than those who wait for it."""
        for name, longer, seconds, what in (
            ("[gateway] timeout", self.gateway.timeout, provider.longest_call, "the exchange and the lookup together"),
            ("[refresh] lease", self.refresh.lease, provider.timeout, ""),
            ("[jobs] lease", self.jobs.lease, provider.timeout, ""),
        ):
            if seconds >= longer:
                twice = f", {seconds:g} s for {what}," if seconds > provider.timeout else ""
                raise ValueError(
                    f"[providers.{provider.id}] timeout ({provider.timeout:g} s){twice} has to be shorter than "
                    f"{name} ({longer:g} s): lower the one or raise the other"
                )

    @property
    def database_url(self) -> str:
        return self.database.url or f"sqlite:///{self.home / 'doorward.db'}"

    @property
    def socket(self) -> Path:
        return self.socket_at(self.grpc.port)

    def socket_at(self, port: int) -> Path:
        """The Unix socket of the worker with this TCP port."""
        return self.grpc.socket or self.home / f"doorward-{port}.sock"

    @property
    def ports(self) -> range:
        """The TCP port of each worker."""
        return range(self.grpc.port, self.grpc.port + self.workers)

    @property
    def key_file(self) -> Path:
        return self.master_key_file or self.home / "master.key"

    def beside(self, path: Path) -> Path:
        """A path of the settings, which is relative to their file."""
        return self.config.parent / path

    @property
    def gateway_url(self) -> str:
        """Where browsers find the gateway."""
        scheme = "http" if self.gateway.tls_cert_file is None else "https"
        return self.public_url or f"{scheme}://127.0.0.1:{self.gateway.port}"

    @property
    def is_https(self) -> bool:
        """Whether browsers come by TLS."""
        return self.gateway_url.lower().startswith("https:")

    @property
    def origins(self) -> frozenset[str]:
        """The origins whose pages may call the cookie routes, in the form of an Origin header."""
        return frozenset(map(_origin, (self.gateway_url, *self.allowed_origins)))


def _origin(url: str) -> str:
    """The origin of a URL as browsers write it (RFC 6454, section 6.2): no path, no default port."""
    parts = urlsplit(url.lower())
    default = {"http": 80, "https": 443}.get(parts.scheme)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port not in (None, default) else "")


def client_secret_variable() -> str | None:
    """The secret for `provider add`, if it stands in the environment."""
    return os.environ.get(CLIENT_SECRET_VARIABLE) or None


def default_home() -> Path:
    """`var/` of the checkout that this package runs from, else of the working directory."""
    checkout = Path(__file__).resolve().parents[2]
    root = checkout if (checkout / "envoy.yaml").is_file() else Path.cwd()
    return root / "var"


def places(home: Path | None = None) -> tuple[Path, Path]:
    """The home and the settings file, whether they exist or not."""
    home = (home or Path(os.environ.get("DOORWARD_HOME") or default_home())).absolute()
    config = os.environ.get("DOORWARD_CONFIG")
    return home, Path(config).absolute() if config else home / "doorward.toml"


def worker_environment(settings: Settings, port: int) -> dict[str, str]:
    """The environment of one worker of several: this process's, but for what each has of its own."""
    own = {"WORKERS": "1", "GRPC_PORT": str(port), "GRPC_SOCKET": str(settings.socket_at(port))}
    if settings.metrics.port is not None:
        own["METRICS_PORT"] = str(settings.metrics.port + port - settings.grpc.port)
    return {**os.environ, **{f"{PREFIX}{name}": value for name, value in own.items()}}


def load(home: Path | None = None, config: Path | None = None, *, workers: int | None = None) -> Settings:
    """Read the settings, of another file than the usual one if need be.

    `workers`: as the command line says, which wins. OperatorError says which one is wrong and how to mend it.
    """
    home, usual = places(home)
    config = config or usual
    given: dict[str, Any] = {} if workers is None else {"workers": workers}
    if not home.is_dir():
        raise OperatorError(f"there is no home {home}: run `doorward init`, or set DOORWARD_HOME or --home")
    _refuse_unknown_variables()
    if "DOORWARD_CONFIG" in os.environ and not config.exists():
        raise OperatorError(f"there is no settings file {config}: mend DOORWARD_CONFIG or run `doorward init`")
    if config.exists() and not config.is_file():
        raise OperatorError(f"{config} is not a file: the settings file belongs there")
    try:
        settings = Settings(home=home, config=config, **given)
    except tomllib.TOMLDecodeError as error:
        raise OperatorError(f"{config} is not valid TOML: {error}") from None
    except UnicodeDecodeError:
        raise OperatorError(f"{config} is not a text file: the settings are TOML") from None
    except OSError as error:
        raise OperatorError(f"cannot read the settings file {config}: {error.strerror}") from None
    except SettingsError as error:
        raise OperatorError(f"a DOORWARD_ variable cannot be read: {error}") from None
    except ValidationError as error:
        raise OperatorError("\n".join(_sentence(config, problem) for problem in error.errors())) from None
    providers = {key: _with_secret(provider, config) for key, provider in settings.providers.items()}
    return settings.model_copy(update={"providers": providers})


def _with_secret(provider: Provider, config: Path) -> Provider:
    if provider.client_secret_file is None:
        return provider
    path = config.parent / provider.client_secret_file
    try:
        secret = path.read_text().removesuffix("\n")
        if not secret:
            raise OperatorError(f"[providers.{provider.id}] client_secret_file: {path} is empty: put the secret in it")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise OperatorError(f"[providers.{provider.id}] client_secret_file: cannot read {path}: {reason}") from None
    return provider.model_copy(update={"client_secret": SecretStr(secret)})


def _known_variables() -> set[str]:
    names = set()
    for name, setting in Settings.model_fields.items():
        section = setting.annotation
        keys = section.model_fields if isinstance(section, type) and issubclass(section, Section) else {}
        names |= {f"{PREFIX}{name}_{key}".upper() for key in keys} or {f"{PREFIX}{name}".upper()}
    return names


def _refuse_unknown_variables() -> None:
    known = _known_variables() | {CLIENT_SECRET_VARIABLE}
    for name in sorted(os.environ):
        if name.startswith(f"{PREFIX}PROVIDERS"):
            raise OperatorError(
                f"{name}: providers stand in the settings file only; keep a secret in client_secret_file"
            )
        if name.startswith(f"{PREFIX}VALIDATORS"):
            raise OperatorError(f"{name}: validators stand in the settings file only: unset it")
        if name.startswith(PREFIX) and name not in known and not name.startswith(_OPEN):
            raise OperatorError(f"{name} is not a setting{_did_you_mean(name, known)}: mend or unset it")


def _did_you_mean(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _sentence(config: Path, problem: Any) -> str:
    """One problem that pydantic found, for a person. It never shows the value, which may be secret."""
    where = [str(part) for part in problem["loc"]]
    match problem["type"]:
        case "missing":
            what = "is missing: add it"
        case "extra_forbidden":
            kind = "setting" if len(where) > 1 else "setting or section"
            what = f"is not a {kind}{_did_you_mean(where[-1], _siblings(where))}: mend or remove it"
        case "value_error":
            what = str(problem["ctx"]["error"])
        case "model_type" | "model_attributes_type" | "dict_type":
            what = f"has to be a section of its own, [{'.'.join(where)}]"
        case _:
            what = problem["msg"][0].lower() + problem["msg"][1:]
    if not where:
        return f"{config}: {what}"
    variable = f"{PREFIX}{'_'.join(part for part in where if not part.isdigit())}".upper()
    also = f" (or {variable})" if variable in _known_variables() else ""
    return f"{config}: {_name(where)}{also}: {what}"


def _name(where: list[str]) -> str:
    """`[section] key, item 1`, as one would look for it in the file."""
    depth = 2 if where[0] in _NAMED else 1
    if len(where) <= depth:
        return where[0] if depth == 1 else f"[{'.'.join(where)}]"
    section, key, *items = ".".join(where[:depth]), where[depth], *where[depth + 1 :]
    position = "".join(f", item {int(item) + 1}" for item in items if item.isdigit())
    return f"[{section}] {key}{position}"


def _siblings(where: list[str]) -> set[str]:
    if len(where) == 1:
        return set(Settings.model_fields) - {"home", "config"}
    if where[0] in _NAMED:
        return set(_NAMED[where[0]].model_fields)
    section = Settings.model_fields[where[0]].annotation
    return set(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else set()
