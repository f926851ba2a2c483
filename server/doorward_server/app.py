"""The one place where settings become objects, and the server's life from start to drain."""

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from doorward.identity.v1 import identity_service_pb2, identity_service_pb2_grpc
from doorward.integration.v1 import integration_service_pb2, integration_service_pb2_grpc
from doorward.keybroker.v1 import keybroker_service_pb2, keybroker_service_pb2_grpc
from doorward_server import metrics, models
from doorward_server.accounts import Accounts
from doorward_server.api_keys import ApiKeys
from doorward_server.applications import Applications
from doorward_server.audit import AccessReads, Audit
from doorward_server.breaker import BreakerPolicy, Breakers
from doorward_server.clients import ApiClients
from doorward_server.clock import Clock
from doorward_server.consents import DEADLINE, Consents, Limits, old_requests
from doorward_server.crypto import KeyRing
from doorward_server.database import Database, open_database
from doorward_server.database.transfer import refuse_moved
from doorward_server.delivery import DELIVERY, STRANGERS, Deliveries, Schedule, old_deliveries
from doorward_server.discord_users import DiscordUsers
from doorward_server.errors import OperatorError
from doorward_server.failures import FailureLimit
from doorward_server.identities import Identities
from doorward_server.integrations import OLD_CLAIMS, REVOCATION, Ahead, Integrations
from doorward_server.jobs import Jobs, abandoned_jobs, outside
from doorward_server.key_validators import KeyValidators
from doorward_server.logs import Log, make_log
from doorward_server.master_keys import KeyFile, MasterKeys
from doorward_server.metrics import Metrics
from doorward_server.monitoring import StateCollector
from doorward_server.oauth import OAuth
from doorward_server.outbound import Bulkhead, Outbound, Timeouts
from doorward_server.provider_registry import ProviderRegistry
from doorward_server.refresher import Refresher
from doorward_server.rpc.headers import SetCookie
from doorward_server.rpc.identity import IdentityServicer
from doorward_server.rpc.integration import IntegrationServicer
from doorward_server.rpc.interceptors import Authenticator, CallInterceptor
from doorward_server.rpc.keybroker import KeyBrokerServicer
from doorward_server.rpc.peers import Peers
from doorward_server.rpc.policy import read_policies
from doorward_server.service_tokens import ServiceTokens
from doorward_server.sessions import Sessions, expired_sessions
from doorward_server.settings import Settings, worker_environment
from doorward_server.supervisor import Launch, RestartPolicy, Supervisor
from doorward_server.tls import ServerTls, is_loopback, read_tls
from doorward_server.upkeep import FOR_EVER, Routine, Sweep, Sweeper
from doorward_server.users import Users
from doorward_server.worker import RetryPolicy, Worker

SERVICES = [
    integration_service_pb2.DESCRIPTOR.services_by_name["IntegrationService"],
    identity_service_pb2.DESCRIPTOR.services_by_name["IdentityService"],
    keybroker_service_pb2.DESCRIPTOR.services_by_name["KeyBrokerService"],
]
CHANNEL_OPTIONS = [
    ("grpc.so_reuseport", 0),  # else a second server takes the same port without a word
    ("grpc.max_receive_message_length", 1 << 20),
    # More than the headers that the gateway lets pass: 60 KiB.
    ("grpc.max_metadata_size", 96 << 10),
    ("grpc.absolute_max_metadata_size", 128 << 10),
    # Whoever opens a connection has to say something soon; the default is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # The gateway and the bot ping idle connections; by default that is punished.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
]
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
_FLUSH_SECONDS = 15.0
_POLL_SECONDS = 0.05
# What a drained server takes at most to end.
_END_SECONDS = 1.0


class App:
    """Everything that a command needs, made when it is first asked for."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or Clock()

    @cached_property
    def log(self) -> Log:
        return make_log(self.settings.log.level)

    @cached_property
    def database(self) -> Database:
        """The database, its schema up to date."""
        section = self.settings.database
        database = open_database(self.settings.database_url, section.busy_timeout, section.connections)
        if database.check_schema():
            database.migrate()
        refuse_moved(database)
        models.bind(database)
        return database

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics()

    @cached_property
    def keys(self) -> KeyRing:
        if self.settings.master_key is not None:
            return KeyRing.parse(self.settings.master_key.get_secret_value(), "DOORWARD_MASTER_KEY")
        return KeyRing.read(self.settings.key_file, self._tell_of_key_file)

    def _tell_of_key_file(self, error: OperatorError) -> None:
        self.log.error("key file cannot be used; the keys at hand stay", problem=str(error))

    @cached_property
    def master_keys(self) -> MasterKeys:
        file = None if self.settings.master_key is not None else KeyFile(self.settings.key_file)
        return MasterKeys(self.database, self.clock, self.keys, file, self.audit)

    @cached_property
    def audit(self) -> Audit:
        return Audit(self.database, self.clock)

    @cached_property
    def access_reads(self) -> AccessReads:
        return AccessReads(self.database, self.clock, self.audit)

    @cached_property
    def users(self) -> Users:
        return Users(self.database, self.clock)

    @cached_property
    def sessions(self) -> Sessions:
        return Sessions(self.database, self.clock, timedelta(seconds=self.settings.sessions.lifetime))

    @cached_property
    def service_tokens(self) -> ServiceTokens:
        return ServiceTokens(self.database, self.clock)

    @cached_property
    def clients(self) -> ApiClients:
        return ApiClients(self.database, self.clock)

    @cached_property
    def applications(self) -> Applications:
        return Applications(self.database, self.clock, self.keys, self.audit)

    @cached_property
    def basic_failures(self) -> FailureLimit:
        """Wrong Basic credentials, counted apart from failed log-ins."""
        return FailureLimit(self.settings.limits.auth_failures, self.clock)

    @cached_property
    def log_in_failures(self) -> FailureLimit:
        return FailureLimit(self.settings.limits.auth_failures, self.clock)

    @cached_property
    def providers(self) -> ProviderRegistry:
        return ProviderRegistry(self.database, self.clock, self.keys, self.settings.providers)

    @cached_property
    def outbound(self) -> Outbound:
        outbound, grpc_section = self.settings.outbound, self.settings.grpc
        bulkhead = Bulkhead(
            threads=grpc_section.threads,
            outbound=outbound.concurrency,
            per_provider=outbound.per_provider,
            waiting=outbound.waiting,
        )
        return Outbound(
            allow=outbound.allow,
            ca_file=outbound.ca_file,
            bulkhead=bulkhead,
            concurrency=outbound.concurrency,
            observe=self.metrics.request_ended,
        )

    @cached_property
    def oauth(self) -> OAuth:
        return OAuth(self.outbound)

    @cached_property
    def jobs(self) -> Jobs:
        return Jobs(self.database, self.clock, self.keys)

    @cached_property
    def integrations(self) -> Integrations:
        refresh = self.settings.refresh
        lease = timedelta(seconds=refresh.lease)
        return Integrations(
            database=self.database,
            clock=self.clock,
            keys=self.keys,
            oauth=self.oauth,
            bulkhead=self.outbound.bulkhead,
            jobs=self.jobs,
            users=self.users,
            providers=self.providers,
            audit=self.audit,
            reads=self.access_reads,
            breakers=self.breakers,
            ahead=Ahead(refresh.ahead, refresh.jitter, lease),
            lease=lease,
            log=self.log,
            metrics=self.metrics,
        )

    @cached_property
    def breakers(self) -> Breakers:
        policy = BreakerPolicy(first=timedelta(seconds=2 * self.settings.refresh.poll))
        return Breakers(policy, self.clock, self.log)

    @cached_property
    def refresher(self) -> Refresher | None:
        """None when nothing is refreshed unasked."""
        refresh = self.settings.refresh
        if not refresh.ahead:
            return None
        return Refresher(
            self.integrations,
            self.providers,
            self.breakers,
            poll=refresh.poll,
            at_once=refresh.at_once,
            log=self.log,
        )

    @cached_property
    def identities(self) -> Identities:
        return Identities(
            database=self.database,
            clock=self.clock,
            oauth=self.oauth,
            providers=self.providers,
            users=self.users,
            sessions=self.sessions,
            failures=self.log_in_failures,
            adoptions=(self.api_keys.adopt, self.consents.adopt),
        )

    @cached_property
    def discord_users(self) -> DiscordUsers:
        return DiscordUsers(self.database, self.clock)

    @cached_property
    def api_keys(self) -> ApiKeys:
        validators = KeyValidators(self.outbound, self.settings.validators)
        return ApiKeys(self.database, self.clock, self.keys, validators, self.audit)

    @cached_property
    def accounts(self) -> Accounts:
        return Accounts(
            database=self.database,
            users=self.users,
            identities=self.identities,
            integrations=self.integrations,
            sessions=self.sessions,
            api_keys=self.api_keys,
            consents=self.consents,
            audit=self.audit,
        )

    @cached_property
    def callback_outbound(self) -> Outbound:
        """The way out to applications, with an allow list of its own."""
        callbacks, threads = self.settings.callbacks, self.settings.jobs.threads
        bulkhead = Bulkhead(
            threads=max(2, threads * 2),
            outbound=threads,
            per_provider=callbacks.per_host,
            waiting=threads,
            peers={STRANGERS: threads - threads // 4},
        )
        return Outbound(
            allow=callbacks.allow,
            setting="[callbacks] allow",
            ca_file=self.settings.outbound.ca_file,
            bulkhead=bulkhead,
            concurrency=threads,
            observe=self.metrics.request_ended,
        )

    @cached_property
    def deliveries(self) -> Deliveries:
        callbacks = self.settings.callbacks
        return Deliveries(
            database=self.database,
            clock=self.clock,
            jobs=self.jobs,
            applications=self.applications,
            api_keys=self.api_keys,
            audit=self.audit,
            callbacks=self.callback_outbound,
            schedule=Schedule(callbacks.schedule),
            timeouts=Timeouts(callbacks.connect_timeout, callbacks.timeout, callbacks.timeout),
            log=self.log,
        )

    @cached_property
    def consents(self) -> Consents:
        limits, consents = self.settings.limits, self.settings.consents
        return Consents(
            database=self.database,
            clock=self.clock,
            applications=self.applications,
            discord_users=self.discord_users,
            api_keys=self.api_keys,
            deliveries=self.deliveries,
            jobs=self.jobs,
            audit=self.audit,
            callbacks=self.callback_outbound,
            limits=Limits(limits.open_per_user, limits.requests_per_address, limits.requests_per_application),
            lifetime=timedelta(seconds=consents.timeout),
            allow_unregistered=consents.allow_unregistered,
            bulkhead=self.outbound.bulkhead,
        )

    @cached_property
    def worker(self) -> Worker:
        jobs = self.settings.jobs
        return Worker(
            self.jobs,
            {
                REVOCATION: outside(self.integrations.revoke_at_provider),
                DEADLINE: self.consents.end,
                DELIVERY: self.deliveries.begin,
            },
            when_abandoned={DELIVERY: self.deliveries.abandon},
            quick=(DEADLINE,),
            retry=RetryPolicy(jobs.schedule),
            lease=timedelta(seconds=jobs.lease),
            poll=jobs.poll,
            threads=jobs.threads,
            log=self.log,
            metrics=self.metrics,
        )

    @cached_property
    def sweeper(self) -> Sweeper:
        """Removes what is kept long enough; deliveries before the requests that they are of."""
        kept = self.settings.retention
        sweeps: list[Sweep] = [OLD_CLAIMS]
        if kept.sessions:
            sweeps.append(expired_sessions(timedelta(seconds=kept.sessions)))
        if kept.jobs:
            sweeps.append(abandoned_jobs(timedelta(seconds=kept.jobs)))
        if kept.deliveries:
            sweeps.append(old_deliveries(timedelta(seconds=kept.deliveries)))
        if kept.requests:
            grants = timedelta(seconds=kept.grants) if kept.grants else FOR_EVER
            sweeps.append(old_requests(timedelta(seconds=kept.requests), grants))
        return Sweeper(self.database, self.clock, sweeps, kept.batch, self.log)

    def start_work(self, stop: threading.Event) -> None:
        """What is done in the background; nothing more is begun once the event is set."""
        self.worker.start()
        Routine("sweeper", self.settings.retention.every, self.sweeper.run, self.log).start(stop)
        if self.refresher is not None:
            self.refresher.start(stop)

    def finish_work(self, grace: float) -> None:
        """Give what is under way so many seconds to end."""
        ends = time.monotonic() + grace
        self.worker.stop(grace)
        if self.refresher is not None:
            self.refresher.finish(ends - time.monotonic())

    @cached_property
    def interceptor(self) -> CallInterceptor:
        """What surrounds every call."""
        return self._make_interceptor(whole_messages=False)

    @cached_property
    def gateway_interceptor(self) -> CallInterceptor:
        """What surrounds every call that comes through the gateway."""
        return self._make_interceptor(whole_messages=True)

    def _make_interceptor(self, *, whole_messages: bool) -> CallInterceptor:
        return CallInterceptor(
            read_policies(SERVICES, self.settings.origins),
            Authenticator(self.sessions, self.service_tokens, self.clients, self.applications, self.basic_failures),
            Peers(self.settings.grpc.gateway_name),
            self.log,
            self.metrics,
            access_log=self.settings.log.access,
            whole_messages=whole_messages,
        )

    def read_tls(self) -> ServerTls | None:
        """What the TCP port is to speak TLS with, if it is."""
        section, beside = self.settings.grpc, self.settings.beside
        if section.tls_cert_file is None or section.tls_key_file is None:
            return None
        client_ca_file = beside(section.client_ca_file) if section.client_ca_file else None
        return read_tls(beside(section.tls_cert_file), beside(section.tls_key_file), client_ca_file)

    @cached_property
    def tls(self) -> ServerTls | None:
        """What the TCP port speaks TLS with, if it does."""
        tls = self.read_tls()
        for pem in filter(None, (tls.certificate, tls.clients) if tls else ()):
            if pem.expires_at <= self.clock.now():
                self.log.warning("certificate has expired", file=str(pem.path), expired_at=pem.expires_at.isoformat())
        return tls

    @contextlib.contextmanager
    def serving_metrics(self) -> Iterator[None]:
        """Answer GET /metrics meanwhile, if the settings say where."""
        section = self.settings.metrics
        if section.port is not None:
            state = StateCollector(self.clock, self.jobs, self.deliveries, self.consents, self.integrations)
            self.metrics.registry.register(state)
        with metrics.served(self.metrics.registry, section.host, section.port):
            yield

    def add_services(self, server: grpc.Server) -> None:
        integration_service_pb2_grpc.add_IntegrationServiceServicer_to_server(
            IntegrationServicer(self.integrations), server
        )
        set_cookie = SetCookie(self.sessions.lifetime, self.settings.is_https)
        identity_service_pb2_grpc.add_IdentityServiceServicer_to_server(
            IdentityServicer(self.accounts, self.identities, self.sessions, self.users, set_cookie), server
        )

        keybroker_service_pb2_grpc.add_KeyBrokerServiceServicer_to_server(
            KeyBrokerServicer(self.consents, self.deliveries, self.api_keys, self.discord_users), server
        )

    def check_providers(self) -> None:
        """Refuse providers that the settings, which may have changed, leave too little time for."""
        for provider in self.providers.list():
            try:
                self.settings.check_timeouts(provider)
            except ValueError as error:
                raise OperatorError(str(error)) from None

    def record_key(self) -> None:
        """What has to be done before the first value is sealed: see `MasterKeys.record`."""
        self.master_keys.record()


@dataclass(frozen=True)
class Server:
    """The gRPC servers and what runs beside them.

    The gateway's socket has a server with threads of its own: nobody on the TCP port can hold those.
    """

    app: App
    works: bool = True  # also does the jobs

    def run(self, on_ready: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, then drain; on SIGQUIT, calls under way get all the time that the gateway
        gives them. `on_ready` is told where, once calls are answered."""
        with _awaited_signals(), self.app.serving_metrics(), self.app.database.listening():
            self._serve(on_ready)

    def _serve(self, on_ready: Callable[[dict[str, Any]], None] | None) -> None:
        settings, log = self.app.settings, self.app.log
        _let_others_finish()
        stop = threading.Event()
        self.app.record_key()
        self.app.check_providers()
        health_servicer = health.HealthServicer()
        for_services = self._build(self.app.interceptor, health_servicer)
        for_gateway = self._build(self.app.gateway_interceptor, health_servicer)
        if settings.grpc.reflection:
            names = [*(service.full_name for service in SERVICES), health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, for_services)
        _listen(for_services, for_gateway, settings, self.app.tls)
        _spare_the_collector()
        for_services.start()
        for_gateway.start()
        if self.works:
            self.app.start_work(stop)
        Routine("audit", _FLUSH_SECONDS, lambda _: self.app.access_reads.flush(), log).start(stop)
        where = {"port": settings.grpc.port, "socket": str(settings.socket), "home": str(settings.home)}
        log.info("serving", **where)
        if on_ready is not None:
            on_ready(where)
        has_time = signal.sigwait(_STOP_SIGNALS) == signal.SIGQUIT
        stop.set()
        log.info("draining", port=settings.grpc.port)
        health_servicer.enter_graceful_shutdown()
        # The gateway's health check has to notice before calls are refused.
        threading.Event().wait(settings.grpc.drain_wait)
        # The socket before the port: a successor that gets the port makes a socket of its own, which
        # is not to be removed any more. gRPC removes ours when it stops listening.
        servers = (for_gateway, for_services)
        if has_time:
            self._end_calls_in_time_or_when_told(servers, settings.gateway.timeout)
        self._end_calls(servers, settings.grpc.drain_grace)
        self.app.outbound.close()
        self.app.callback_outbound.close()
        log.info("stopped", port=settings.grpc.port)

    def _end_calls(self, servers: Sequence[grpc.Server], grace: float) -> None:
        """Take in no more calls and jobs; those under way have `grace` seconds, also if they had more before."""
        stopped = [server.stop(grace) for server in servers]
        if self.works:
            self.app.finish_work(grace)
        for one in stopped:
            one.wait()

    def _end_calls_in_time_or_when_told(self, servers: Sequence[grpc.Server], grace: float) -> None:
        """The same, until a further signal says that there is no time for it."""
        ending = threading.Thread(target=self._end_calls, args=(servers, grace), name="ending", daemon=True)
        ending.start()
        while ending.is_alive() and signal.sigtimedwait(_STOP_SIGNALS, _POLL_SECONDS) is None:
            pass

    def _build(self, interceptor: CallInterceptor, health_servicer: health.HealthServicer) -> grpc.Server:
        settings = self.app.settings.grpc
        server = grpc.server(
            ThreadPoolExecutor(settings.threads, thread_name_prefix="call"),
            interceptors=[interceptor],
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs,
            options=CHANNEL_OPTIONS,
        )
        self.app.add_services(server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        return server


def supervise(
    settings: Settings,
    *,
    works: bool,
    policy: RestartPolicy | None = None,
    on_ready: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Run `workers` servers, each an ordinary `doorward serve`, until SIGTERM or SIGINT; SIGHUP replaces them.

    Their ports stay theirs while they are away: else an outgoing connection of any program may take one.
    """
    options = ["--home", str(settings.home), "serve", "--work" if works else "--no-work", "--json"]
    launches = [
        # -X worker does nothing but show in `ps`; -P keeps the working directory out of the import path.
        Launch(
            port,
            [sys.executable, "-P", "-X", f"worker={port}", "-m", "doorward_server", *options],
            worker_environment(settings, port),
        )
        for port in settings.ports
    ]
    sockets = [{"port": port, "socket": str(settings.socket_at(port))} for port in settings.ports]
    drain_wait = settings.grpc.drain_wait
    supervisor = Supervisor(
        launches,
        policy=policy or RestartPolicy(),
        stop_patience=drain_wait + settings.grpc.drain_grace + _END_SECONDS,
        replace_patience=drain_wait + settings.gateway.timeout + settings.grpc.drain_grace + _END_SECONDS,
        settle=drain_wait,
        log=make_log(settings.log.level),
    )

    def tell() -> None:
        if on_ready is not None:
            on_ready({"home": str(settings.home), "workers": sockets})

    with contextlib.ExitStack() as held:
        for port in settings.ports:
            held.enter_context(_hold(settings.grpc.host, port))
        supervisor.run(tell)


def run_worker(app: App, on_ready: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Do the work in the background until SIGTERM or SIGINT; what is under way is given the time of a drain."""
    stop = threading.Event()
    with _awaited_signals(), app.serving_metrics(), app.database.listening():
        app.record_key()
        app.start_work(stop)
        where = {"home": str(app.settings.home)}
        app.log.info("working", **where)
        if on_ready is not None:
            on_ready(where)
        signal.sigwait(_STOP_SIGNALS)
        stop.set()
        app.log.info("draining")
        app.finish_work(app.settings.grpc.drain_grace)
        app.log.info("stopped")


@contextlib.contextmanager
def _awaited_signals() -> Iterator[None]:
    """The stop signals are waited for, not handled: a handler that a second signal interrupts may deadlock."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    except OperatorError:  # after a drain, further signals must not count any more
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise


def _let_others_finish() -> None:
    """Whoever wakes up waits for its turn, and interrupts nobody (SCHED_BATCH, see decision 14); threads inherit it."""
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(OSError):  # not allowed here: then it is a little slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _spare_the_collector() -> None:
    """Modules and services live for ever: walking them again and again took a sixth of a quick call's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _listen(for_services: grpc.Server, for_gateway: grpc.Server, settings: Settings, tls: ServerTls | None) -> None:
    """Bind the TCP port and the gateway's socket. The port comes first: who has it owns the socket too."""
    host = settings.grpc.host.strip("[]")
    if not is_loopback(host) and tls is None and not settings.grpc.allow_plaintext:
        raise OperatorError(
            f"[grpc] host: {host} may be reached from other machines, and service tokens would go there in clear: "
            "set [grpc] tls_cert_file and tls_key_file, or allow_plaintext = true if the network is your own"
        )
    address = f"[{host}]:{settings.grpc.port}" if ":" in host else f"{host}:{settings.grpc.port}"
    try:
        if tls is None:
            for_services.add_insecure_port(address)
        else:
            for_services.add_secure_port(address, _credentials(tls))
    except RuntimeError:
        raise _cannot_listen(address) from None
    path = settings.socket
    if _is_served(path):
        raise OperatorError(f"another server answers on {path}: stop it or set DOORWARD_GRPC_SOCKET")
    try:
        for_gateway.add_insecure_port(f"unix:{path}")
        path.chmod(0o600)
    except (RuntimeError, OSError):
        raise OperatorError(
            f"cannot listen on the Unix socket {path}: make its folder writable or set DOORWARD_GRPC_SOCKET"
        ) from None


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """gRPC verifies a client's certificate only where it requires one: there is no optional one in Python."""
    pair = (tls.key, tls.certificate.text)
    if tls.clients is None:
        return grpc.ssl_server_credentials([pair])
    return grpc.ssl_server_credentials([pair], tls.clients.text, require_client_auth=True)


def _hold(host: str, port: int) -> socket.socket:
    """Bind a port and do not listen, which leaves it to those who listen with SO_REUSEADDR, as gRPC does."""
    holder = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        holder = socket.socket(family, kind, protocol)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)
    except OSError:
        if holder is not None:
            holder.close()
        raise _cannot_listen(f"{host}:{port}") from None
    return holder


def _cannot_listen(address: str) -> OperatorError:
    return OperatorError(
        f"cannot listen on {address}: the port is in use or not allowed. Stop its owner or set DOORWARD_GRPC_PORT"
    )


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
