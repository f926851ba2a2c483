"""The clock is put forward or back by an hour: nothing is lost, done twice, or held up by who is gone."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.consents import Question, Status
from doorward_server.models import Connection, ConsentRequest, Delivery, Job
from tests.contract.test_request_api_key import ALLOWED, CALLBACK
from tests.rpc.conftest import SetClock, opened
from tests.sandbox.client import SandboxProvider
from tests.stack import Person, Stack, make_stack

HOUR = timedelta(hours=1)
JUMPS = pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "back"])


@dataclass(frozen=True)
class World:
    """An app whose clock jumps."""

    app: App
    clock: SetClock
    stack: Stack

    def person(self) -> Person:
        """Somebody whose token lives for a day."""
        self.stack.provider.configure(expires_in=86400)
        user = self.app.users.create("Ada")
        _, cookie = self.app.sessions.create(user)
        self.stack.secrets.add(cookie)
        self.app.integrations.connect(user.id, "flo", self.stack.provider.code("flo"))
        return Person(user.id, user.slug, cookie)

    def refreshes(self) -> int:
        return len(self.stack.provider.requests(grant_type="refresh_token"))

    def work(self) -> None:
        """Do all jobs that are due."""
        while self.app.worker.run_one():
            pass


@pytest.fixture
def world(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> Iterator[World]:
    stack = make_stack(tmp_path / "home", logs, provider, secrets, ALLOWED)
    clock = SetClock()
    with opened(settings_module.load(stack.home), logs / "clock-jumps.log", clock) as app:
        yield World(app, clock, stack)


@JUMPS
def test_a_token_stays_what_it_is(world: World, jump: timedelta) -> None:
    person = world.person()
    before = world.app.integrations.access_token(person.slug, "flo").value
    world.clock.ahead = jump
    assert world.app.integrations.access_token(person.slug, "flo").value == before
    assert world.app.sessions.find(person.cookie) is not None
    assert world.refreshes() == 0
    assert world.app.audit.verify().is_intact


@JUMPS
def test_a_token_that_has_run_out_is_refreshed_once(world: World, jump: timedelta) -> None:
    person = world.person()
    world.clock.ahead = timedelta(days=1)
    fresh = world.app.integrations.access_token(person.slug, "flo").value
    world.clock.ahead += jump
    assert world.app.integrations.access_token(person.slug, "flo").value == fresh
    assert world.refreshes() == 1


@JUMPS
def test_who_died_holding_a_lease_holds_up_nobody(world: World, jump: timedelta) -> None:
    person = world.person()
    world.clock.ahead = timedelta(days=1)
    with world.app.database.writing():
        lease_end = world.app.clock.now() + world.app.integrations.lease
        Connection.update(lease_epoch=Connection.lease_epoch + 1, lease_expires_at=lease_end).execute()
    world.clock.ahead += jump
    # As for who has a token that is too old whatever the clock says.
    assert world.app.integrations.access_token(person.slug, "flo", min_ttl=86400 - 1).value.startswith("access-")
    assert world.refreshes() == 1


@JUMPS
def test_a_request_ends_once(world: World, jump: timedelta) -> None:
    world.app.consents.request(Question("Bot", "1", CALLBACK, "state"), None, "192.0.2.1")
    world.clock.ahead = jump
    world.work()
    [request] = ConsentRequest.select()
    assert request.status == (Status.TIMED_OUT if jump > timedelta(0) else Status.PENDING)
    world.clock.ahead = HOUR
    world.work()
    world.clock.ahead = 2 * HOUR
    world.work()
    [request] = ConsentRequest.select()
    [delivery] = Delivery.select()
    assert (request.status, delivery.error) == (Status.TIMED_OUT, "timeout")
    assert world.app.audit.verify().is_intact


@JUMPS
def test_a_claimed_job_is_done_by_one(world: World, jump: timedelta) -> None:
    """Whoever comes late finds that another worker has claimed the job since."""
    jobs = world.app.jobs
    with world.app.database.writing():
        jobs.queue("greet", {})
    late = jobs.claim(timedelta(seconds=60))
    assert late is not None
    world.clock.ahead = jump
    other = jobs.claim(timedelta(seconds=60))
    # Put back, the claim lasts longer; put forward, it has run out.
    assert (other is not None) == (jump > timedelta(0))
    with world.app.database.writing():
        jobs.end(late)
    assert Job.select().count() == (1 if other else 0)
