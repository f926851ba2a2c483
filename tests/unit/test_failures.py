"""The limit of failures: how many, for how long, and of whom."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from doorward_server.errors import TooManyFailures
from doorward_server.failures import FailureLimit
from tests.unit.conftest import StoppedClock

CALLER = ("dwc_1", "192.0.2.1")


def add_until_refused(limit: FailureLimit, caller: tuple[str, str] = CALLER, most: int = 100) -> int:
    """How many failures are let pass."""
    for passed in range(most):
        try:
            limit.add(*caller)
        except TooManyFailures:
            return passed
    return most


@pytest.mark.parametrize("per_minute", [1, 3, 30])
def test_so_many_failures_are_let_pass(clock: StoppedClock, per_minute: int) -> None:
    limit = FailureLimit(per_minute, clock)
    for _ in range(per_minute):
        limit.add(*CALLER)
    with pytest.raises(TooManyFailures):
        limit.add(*CALLER)


def test_zero_is_no_limit(clock: StoppedClock) -> None:
    limit = FailureLimit(0, clock)
    assert add_until_refused(limit, most=1000) == 1000


@pytest.mark.parametrize(
    ("later", "retry_after"),
    [(0, "60"), (0.5, "60"), (1, "59"), (30, "30"), (58.9, "2"), (59, "1"), (59.999, "1")],
    ids=lambda value: f"{value} s" if isinstance(value, int | float) else None,
)
def test_when_to_try_again(clock: StoppedClock, later: float, retry_after: str) -> None:
    limit = FailureLimit(1, clock)
    limit.add(*CALLER)
    clock.advance(timedelta(seconds=later))
    with pytest.raises(TooManyFailures) as refusal:
        limit.add(*CALLER)
    assert refusal.value.metadata == {"retry_after": retry_after}


def test_the_minute_begins_with_the_first_failure(clock: StoppedClock) -> None:
    """Neither later failures nor refused attempts make it longer."""
    limit = FailureLimit(2, clock)
    for _ in range(4):
        add_until_refused(limit, most=1)
        clock.advance(timedelta(seconds=14.9))
    with pytest.raises(TooManyFailures):
        limit.add(*CALLER)
    clock.advance(timedelta(seconds=0.4))
    assert add_until_refused(limit) == 2


def test_after_the_minute_all_is_forgotten(clock: StoppedClock) -> None:
    limit = FailureLimit(3, clock)
    for _ in range(3):
        assert add_until_refused(limit) == 3
        clock.advance(timedelta(seconds=60))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(("dwc_2", "192.0.2.1"), id="another client at the address"),
        pytest.param(("dwc_1", "192.0.2.2"), id="the client at another address"),
        pytest.param(("", "192.0.2.1"), id="nobody in particular at the address"),
        pytest.param(("192.0.2.1", "dwc_1"), id="the names swapped"),
        pytest.param(("", ""), id="nothing known"),
    ],
)
def test_others_are_counted_apart(clock: StoppedClock, other: tuple[str, str]) -> None:
    limit = FailureLimit(2, clock)
    assert add_until_refused(limit) == 2
    assert add_until_refused(limit, other) == 2


def test_limits_of_two_processes_are_apart(clock: StoppedClock) -> None:
    one, other = FailureLimit(2, clock), FailureLimit(2, clock)
    assert [add_until_refused(one), add_until_refused(other)] == [2, 2]


def test_no_failure_of_many_threads_is_lost(clock: StoppedClock) -> None:
    limit, threads = FailureLimit(100, clock), 8
    start = threading.Barrier(threads)

    def fail(_: int) -> int:
        start.wait(10)
        passed = 0
        for _ in range(50):
            try:
                limit.add(*CALLER)
            except TooManyFailures:
                continue
            passed += 1
        return passed

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(fail, range(threads))) == 100


def test_a_crowd_of_callers_takes_bounded_memory(clock: StoppedClock) -> None:
    """Who fails now is remembered, whoever was quiet for the longest is not."""
    limit = FailureLimit(1, clock)
    limit.add(*CALLER)
    for number in range(20_000):
        limit.add("", str(number))
    limit.add(*CALLER)
    with pytest.raises(TooManyFailures):
        limit.add("", "19999")
