"""Identities under fire: many callers race through one gateway to two servers; and what wrong credentials tell."""

import concurrent.futures
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc
import httpx
import pytest

from doorward.identity.v1 import identity_service_pb2 as pb
from doorward.identity.v1 import identity_service_pb2_grpc as stubs
from tests.processes import free_port
from tests.sandbox.client import SandboxProvider
from tests.stack import Client, Person, Stack, basic, make_stack, rest

CALLERS = 32
ROUNDS = 3
SOAK_ROUNDS = 50
Request = Callable[[], httpx.Response]


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> Iterator[Stack]:
    """One home, two servers, and a gateway before both."""
    home = tmp_path_factory.mktemp("identity") / "home"
    stack = make_stack(home, logs, shared_provider, secrets, "[limits]\nauth_failures = 0\n")
    ports = [stack.grpc_port, free_port()]
    stack.environment |= {
        "DOORWARD_GATEWAY_UPSTREAMS": ", ".join(f"unix:{home}/doorward-{port}.sock" for port in ports),
        "DOORWARD_GATEWAY_DRAIN_WAIT": "0",
        "DOORWARD_GRPC_DRAIN_WAIT": "0",
    }
    with ExitStack() as exit_stack:
        servers = [exit_stack.enter_context(stack.server(port)) for port in ports]
        exit_stack.enter_context(stack.gateway())
        yield stack
        shares = [server.output().count('"call"') for server in servers]
        assert min(shares) > 0, "one server did it all"


@pytest.fixture
def two_servers(house: Stack, provider: SandboxProvider) -> Stack:
    """That home, with a provider in its initial state."""
    return house


@pytest.fixture(scope="module")
def client(house: Stack) -> Client:
    return house.client()


def at_once(requests: Sequence[Request]) -> list[httpx.Response]:
    """Send all of them at the same instant, as far as threads can."""
    start = threading.Barrier(len(requests))

    def send(request: Request) -> httpx.Response:
        start.wait()
        return request()

    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, requests))


def outcome(answer: httpx.Response) -> str:
    """The status, and the reason of an error."""
    details = answer.json().get("details", [])
    return " ".join([str(answer.status_code), *[detail["reason"] for detail in details]])


def outcomes(answers: Sequence[httpx.Response]) -> dict[str, int]:
    return dict(Counter(map(outcome, answers)))


def link(stack: Stack, client: Client, user: Person, **proof: str) -> httpx.Response:
    path = f"/api/users/{user.id}/o-auth-identities"
    return rest(stack, "POST", path, headers=client.headers, json={"provider": "sandbox", **proof})


def create(stack: Stack, client: Client, **body: str) -> httpx.Response:
    return rest(stack, "POST", "/api/users", headers=client.headers, json=body)


def log_in(stack: Stack, client: Client, token: str) -> httpx.Response:
    body = {"provider": "sandbox", "accessToken": token}
    answer = rest(stack, "POST", "/api/auth/login-o-auth", headers=client.headers, json=body)
    stack.secrets.update(answer.cookies.values())
    return answer


def count(stack: Stack, sql: str, *parameters: object) -> int:
    [number] = stack.app.database.fetch_one(sql, parameters) or ()
    return int(number)


@pytest.mark.parametrize("proof", ["accessToken", "code"])
def test_an_identity_has_one_user(two_servers: Stack, client: Client, proof: str, soaking: bool) -> None:
    """32 users at once: one gets the identity, and the others' lose nothing but the race."""
    provider = two_servers.provider
    for number in range(SOAK_ROUNDS if soaking else ROUNDS):
        account = f"{proof}-{number}"
        users = [two_servers.person(client) for _ in range(CALLERS)]
        token = provider.access_token(account)
        given = [token if proof == "accessToken" else provider.code("sandbox", account) for _ in users]
        answers = at_once(
            [
                lambda user=user, one=one: link(two_servers, client, user, **{proof: one})  # type: ignore[misc]
                for user, one in zip(users, given, strict=True)
            ]
        )
        assert outcomes(answers) == {"200": 1, "409 IDENTITY_TAKEN": CALLERS - 1}
        assert count(two_servers, "SELECT count(*) FROM oauth_identities WHERE subject = ?", account) == 1
        [winner] = [user for user, answer in zip(users, answers, strict=True) if answer.status_code == 200]
        assert outcome(log_in(two_servers, client, token)) == "200"
        assert count(two_servers, "SELECT user_id FROM oauth_identities WHERE subject = ?", account) == winner.id


def test_one_user_links_the_same_identity_at_once(two_servers: Stack, client: Client) -> None:
    user, token = two_servers.person(client), two_servers.provider.access_token("same")
    answers = at_once([lambda: link(two_servers, client, user, accessToken=token)] * CALLERS)
    assert outcomes(answers) == {"200": CALLERS}
    identities = [{"provider": "sandbox", "id": "same"}]
    assert [answer.json()["oAuthIdentities"] for answer in answers] == [identities] * CALLERS


@pytest.mark.parametrize(
    ("bodies", "reason"),
    [
        pytest.param(lambda n: [{"name": f"Ada {n}"}] * CALLERS, "SLUG_TAKEN", id="name"),
        pytest.param(lambda n: [{"name": f"{'!' * i}Grace {n}"} for i in range(CALLERS)], "SLUG_TAKEN", id="slug"),
        pytest.param(
            lambda n: [
                {"name": f"Mail {n} {i}", "email": f"{'Ü' if i % 2 else 'ü'}{n}@x.example"} for i in range(CALLERS)
            ],
            "EMAIL_TAKEN",
            id="e-mail",
        ),
    ],
)
def test_a_name_and_an_address_have_one_user(
    two_servers: Stack, client: Client, bodies: Callable[[int], list[dict[str, str]]], reason: str, soaking: bool
) -> None:
    for number in range(SOAK_ROUNDS if soaking else ROUNDS):
        before = count(two_servers, "SELECT count(*) FROM users")
        answers = at_once(
            [lambda body=body: create(two_servers, client, **body) for body in bodies(number)]  # type: ignore[misc]
        )
        assert outcomes(answers) == {"200": 1, f"409 {reason}": CALLERS - 1}
        assert count(two_servers, "SELECT count(*) FROM users") == before + 1


ACTIONS: dict[str, Callable[[Stack, Client, Person, str], httpx.Response]] = {
    "log in": lambda stack, client, _, token: log_in(stack, client, token),
    "link": lambda stack, client, user, token: link(stack, client, user, accessToken=token),
    "update": lambda stack, client, user, _: rest(
        stack, "PATCH", f"/api/users/{user.id}", headers=client.headers, json={"role": "teacher"}
    ),
    "read": lambda stack, client, user, _: rest(stack, "GET", f"/api/users/{user.id}", headers=client.headers),
    "unlink": lambda stack, client, user, _: rest(
        stack, "DELETE", f"/api/users/{user.id}/o-auth-identities/sandbox/{user.slug}", headers=client.headers
    ),
}
GONE = {"404 USER_NOT_FOUND", "404 NO_SUCH_IDENTITY", "404 IDENTITY_NOT_FOUND"}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_a_user_is_deleted_meanwhile(
    two_servers: Stack,
    client: Client,
    action: Callable[[Stack, Client, Person, str], httpx.Response],
    soaking: bool,
) -> None:
    """Whatever races with the deletion is done before it or finds nobody, and leaves nothing behind."""
    seen: Counter[str] = Counter()
    for _ in range(10 * SOAK_ROUNDS if soaking else 4 * ROUNDS):
        user = two_servers.person(client)
        token = two_servers.provider.access_token(user.slug)
        assert link(two_servers, client, user, accessToken=token).status_code == 200

        def delete(user: Person = user) -> httpx.Response:
            time.sleep(random.uniform(0, 0.01))  # the instant is the point, not a condition
            return rest(two_servers, "DELETE", f"/api/users/{user.id}", headers=client.headers)

        def act(user: Person = user, token: str = token) -> httpx.Response:
            return action(two_servers, client, user, token)

        deleted, *answers = at_once([delete, act, act, act])
        assert outcome(deleted) == "200"
        found = outcomes(answers)
        assert set(found) <= {"200"} | GONE
        seen.update(found)
        for table in ("sessions", "oauth_identities", "connections"):
            assert count(two_servers, f"SELECT count(*) FROM {table} WHERE user_id = ?", user.id) == 0
    print(dict(seen))


def test_two_deletions(two_servers: Stack, client: Client) -> None:
    user = two_servers.person(client)
    two_servers.connect(user)
    path = f"/api/users/{user.id}"
    answers = at_once([lambda: rest(two_servers, "DELETE", path, headers=client.headers)] * 8)
    assert outcomes(answers) == {"200": 1, "404 USER_NOT_FOUND": 7}


def test_log_outs_and_log_ins_at_once(two_servers: Stack, client: Client) -> None:
    """One cookie is presented by many: each log-in gets a session of its own, and the cookie is dead."""
    user = two_servers.person(client)
    token = two_servers.provider.access_token(user.slug)
    assert link(two_servers, client, user, accessToken=token).status_code == 200
    cookie = {"cookie": f"doorward_session={user.cookie}"}
    body = {"provider": "sandbox", "accessToken": token}

    def replace_session() -> httpx.Response:
        headers = {**client.headers, **cookie}
        answer = rest(two_servers, "POST", "/api/auth/login-o-auth", headers=headers, json=body)
        two_servers.secrets.update(answer.cookies.values())
        return answer

    def log_out() -> httpx.Response:
        return rest(two_servers, "DELETE", "/api/auth/session", headers=cookie)

    answers = at_once([replace_session, log_out] * 8)
    assert outcomes(answers[::2]) == {"200": 8}
    assert set(outcomes(answers[1::2])) <= {"200", "401 NO_SESSION"}
    assert len({answer.cookies["doorward_session"] for answer in answers[::2]}) == 8
    assert count(two_servers, "SELECT count(*) FROM sessions WHERE user_id = ?", user.id) == 8


# What the time of an answer tells

CALLS = 1000
ATTEMPTS = 3
# By chance beyond it: once in 370 attempts, and three times in a row once in fifty million runs.
BOUND = 3.0
LEAK = 20e-6  # seconds: less than a read of the database or a slow hash takes


def standard_score(first: Sequence[float], second: Sequence[float]) -> float:
    """How unlike pairs are, by Wilcoxon's signed ranks: of the normal distribution if there is no difference."""
    differences = sorted((one - other for one, other in zip(first, second, strict=True)), key=abs)
    count = len(differences)
    positive = sum(rank for rank, difference in enumerate(differences, 1) if difference > 0)
    return float((positive - count * (count + 1) / 4) / (count * (count + 1) * (2 * count + 1) / 24) ** 0.5)


def measure(stack: Stack, credentials: dict[str, str]) -> dict[str, list[float]]:
    """Seconds that the server takes to refuse each of the credentials, asked in pairs over its Unix socket."""
    times: dict[str, list[float]] = {name: [] for name in credentials}
    with grpc.insecure_channel(f"unix:{stack.home}/doorward-{stack.grpc_port}.sock") as channel:
        stub = stubs.IdentityServiceStub(channel)

        def ask(name: str) -> float:
            started = time.perf_counter()
            with pytest.raises(grpc.RpcError) as refusal:
                stub.GetUser(pb.GetUserRequest(handle="1"), metadata=(("authorization", credentials[name]),))
            taken = time.perf_counter() - started
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
            return taken

        for warm_up in (True, False):
            for _ in range(CALLS // 10 if warm_up else CALLS):
                for name in random.sample([*credentials], len(credentials)):
                    taken = ask(name)
                    if not warm_up:
                        times[name].append(taken)
    return times


def test_the_time_of_a_refusal_does_not_tell_which_clients_exist(stack: Stack, client_of_stack: Client) -> None:
    """An unknown client and a wrong secret take the same time, to within what a database read would take."""
    secret = "dws_" + "x" * (len(client_of_stack.secret) - 4)
    credentials = {
        "wrong secret": basic(client_of_stack.id, secret),
        "unknown client": basic("dwc_" + "0" * (len(client_of_stack.id) - 4), secret),
    }
    for attempt in range(1, ATTEMPTS + 1):
        known, unknown = measure(stack, credentials).values()
        median, difference = statistics.median(known), statistics.median(known) - statistics.median(unknown)
        score = standard_score(known, unknown)
        control = standard_score([taken + LEAK for taken in known], unknown)
        print(
            f"attempt {attempt}: median {median * 1e6:.0f} us, difference {difference * 1e6:+.1f} us, z {score:+.2f}; "
            f"a leak of {LEAK * 1e6:.0f} us would make z {control:+.2f}"
        )
        if abs(difference) < 0.1 * median and abs(score) < BOUND:
            return
    pytest.fail("the time tells whether a client exists")


@pytest.fixture
def client_of_stack(stack: Stack) -> Client:
    return stack.client()
