"""Breakers: when a provider is left alone, when it is tried again, and what the operator reads of it."""

import contextlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from doorward_server.breaker import Breaker, BreakerPolicy, Breakers
from doorward_server.errors import (
    Busy,
    GrantRefused,
    ProviderMalformed,
    ProviderNotConfigured,
    ProviderTimeout,
    ProviderUnavailable,
    RefreshRejected,
    StorageUnavailable,
)
from doorward_server.logs import make_log
from doorward_server.oauth import NoTokenGranted
from doorward_server.outbound import ConnectTimeout, NotConnectable
from tests.unit.conftest import StoppedClock

POLICY = BreakerPolicy(threshold=3, first=timedelta(seconds=10), longest=timedelta(seconds=60))
MANY = 8


@pytest.fixture
def breakers(clock: StoppedClock, capfd: pytest.CaptureFixture[str]) -> Breakers:
    return Breakers(POLICY, clock, make_log("info"))


def request(breakers: Breakers, failure: Exception | None = None, provider: str = "flo") -> None:
    """A request that ends so."""
    with contextlib.suppress(Exception), breakers.watching(provider):
        if failure is not None:
            raise failure


def open_it(breakers: Breakers, provider: str = "flo") -> None:
    for _ in range(POLICY.threshold):
        request(breakers, ProviderTimeout(), provider)
    assert breakers.allowance(provider, MANY) == 0


def logged(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    return [{key: value for key, value in line.items() if key != "timestamp"} for line in lines]


# The policy


@pytest.mark.parametrize(
    ("pauses", "luck", "seconds"),
    [
        pytest.param(0, 0.0, 10, id="first"),
        pytest.param(1, 0.0, 20, id="second"),
        pytest.param(2, 0.0, 40, id="third"),
        pytest.param(3, 0.0, 60, id="longest"),
        pytest.param(100_000, 0.0, 60, id="after years"),
        pytest.param(0, 1.0, 12.5, id="first with jitter"),
        pytest.param(9, 1.0, 75, id="longest with jitter"),
    ],
)
def test_pauses_grow(pauses: int, luck: float, seconds: float) -> None:
    assert POLICY.pause(pauses, luck) == timedelta(seconds=seconds)


NOW = datetime(2030, 1, 1, tzinfo=UTC)
LATER, EARLIER = NOW + timedelta(seconds=1), NOW - timedelta(seconds=1)


@pytest.mark.parametrize(
    ("breaker", "most", "allowed"),
    [
        pytest.param(Breaker(), MANY, MANY, id="new"),
        pytest.param(Breaker(failures=2), MANY, MANY, id="some failures"),
        pytest.param(Breaker(failures=2), 0, 0, id="no room"),
        pytest.param(Breaker(pauses=1, probe_at=LATER), MANY, 0, id="open"),
        pytest.param(Breaker(pauses=1, probe_at=NOW), MANY, 1, id="time for a probe"),
        pytest.param(Breaker(pauses=9, probe_at=EARLIER), MANY, 1, id="long time for a probe"),
        pytest.param(Breaker(pauses=9, probe_at=EARLIER), 0, 0, id="no room for a probe"),
    ],
)
def test_what_may_be_begun(breaker: Breaker, most: int, allowed: int) -> None:
    assert breaker.allowance(most, NOW) == allowed


# What counts


@pytest.mark.parametrize(
    ("failure", "counts"),
    [
        pytest.param(ProviderUnavailable(), True, id="down"),
        pytest.param(NotConnectable(), True, id="not connectable"),
        pytest.param(ProviderTimeout(), True, id="slow"),
        pytest.param(ConnectTimeout(), True, id="slow to connect"),
        pytest.param(ProviderMalformed(), True, id="nonsense"),
        pytest.param(NoTokenGranted(), True, id="no token"),
        pytest.param(RefreshRejected(), False, id="refusal"),
        pytest.param(GrantRefused(), False, id="invalid_grant"),
        pytest.param(Busy(), False, id="not asked"),
        pytest.param(ProviderNotConfigured(), False, id="not configured"),
        pytest.param(StorageUnavailable(), False, id="storage"),
        pytest.param(RuntimeError(), False, id="bug"),
    ],
)
def test_what_opens_a_breaker(breakers: Breakers, failure: Exception, counts: bool) -> None:
    for number in range(POLICY.threshold):
        assert breakers.allowance("flo", MANY) == MANY, number
        request(breakers, failure)
    assert breakers.allowance("flo", MANY) == (0 if counts else MANY)


@pytest.mark.parametrize(
    ("between", "is_open"),
    [
        pytest.param(None, False, id="success"),
        pytest.param(GrantRefused(), False, id="a refusal is an answer"),
        pytest.param(RefreshRejected(), False, id="another refusal"),
        pytest.param(Busy(), True, id="not asked"),
    ],
)
def test_failures_count_only_in_a_row(breakers: Breakers, between: Exception | None, is_open: bool) -> None:
    for _ in range(POLICY.threshold - 1):
        request(breakers, ProviderTimeout())
    request(breakers, between)
    request(breakers, ProviderTimeout())
    assert breakers.allowance("flo", MANY) == (0 if is_open else MANY)


def test_an_error_passes(breakers: Breakers) -> None:
    with pytest.raises(ProviderTimeout), breakers.watching("flo"):
        raise ProviderTimeout


# Open and closed


def test_one_probe_after_each_pause(breakers: Breakers, clock: StoppedClock) -> None:
    open_it(breakers)
    waited = []
    for _ in range(5):
        seconds = 0
        while not breakers.allowance("flo", MANY):
            clock.advance(timedelta(seconds=1))
            seconds += 1
        waited.append(seconds)
        assert breakers.allowance("flo", MANY) == 1
        breakers.begin("flo")
        assert breakers.allowance("flo", MANY) == 0, "a second probe beside the first"
        request(breakers, ProviderUnavailable())
    for seconds, least in zip(waited, (10, 20, 40, 60, 60), strict=True):
        assert least <= seconds <= least * 1.25 + 1


def test_a_probe_that_is_never_heard_of_again(breakers: Breakers, clock: StoppedClock) -> None:
    open_it(breakers)
    clock.advance(timedelta(seconds=13))
    breakers.begin("flo")
    clock.advance(timedelta(seconds=26))
    assert breakers.allowance("flo", MANY) == 1


@pytest.mark.parametrize(
    "answer", [pytest.param(None, id="success"), pytest.param(GrantRefused(), id="a refusal is an answer")]
)
def test_a_success_closes_it(
    breakers: Breakers, clock: StoppedClock, capfd: pytest.CaptureFixture[str], answer: Exception | None
) -> None:
    open_it(breakers)
    clock.advance(timedelta(seconds=13))
    breakers.begin("flo")
    request(breakers, answer)
    assert breakers.allowance("flo", MANY) == MANY
    assert logged(capfd) == [
        {"event": "breaker opened", "level": "warning", "provider": "flo", "reason": "PROVIDER_TIMEOUT"},
        {"event": "breaker closed", "level": "info", "provider": "flo"},
    ]
    # And it begins anew: as many failures, and the first pause.
    open_it(breakers)
    clock.advance(timedelta(seconds=12.5))
    assert breakers.allowance("flo", MANY) == 1


def test_a_caller_s_success_closes_it_too(breakers: Breakers) -> None:
    open_it(breakers)
    request(breakers)
    assert breakers.allowance("flo", MANY) == MANY


def test_failures_while_it_is_open_say_nothing_new(
    breakers: Breakers, clock: StoppedClock, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of callers, and of what was under way when it opened."""
    open_it(breakers)
    for _ in range(50):
        request(breakers, ProviderUnavailable())
    clock.advance(timedelta(seconds=12.5))
    assert breakers.allowance("flo", MANY) == 1
    assert len(logged(capfd)) == 1


def test_each_provider_has_its_own(breakers: Breakers) -> None:
    open_it(breakers, "flo")
    request(breakers, ProviderTimeout(), "min")
    assert [breakers.allowance(provider, MANY) for provider in ("flo", "min", "eag")] == [0, MANY, MANY]


def test_a_closed_one_needs_no_probe(breakers: Breakers) -> None:
    breakers.begin("flo")
    assert breakers.allowance("flo", MANY) == MANY
