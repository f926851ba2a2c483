"""Requests that may be repeated use kept connections; a dead one costs a repetition, and nothing else does."""

import socket
import threading
from collections.abc import Sequence

import pytest

from doorward_server.errors import ProviderUnavailable
from doorward_server.outbound import Answer, Outbound, Timeouts
from tests.unit.peers import Peer, Serve, answering, make_outbound, read_request

_TIMEOUTS = Timeouts(connect=5, read=5, total=5)
_ANSWER = answering(b'{"id":"ada"}')


def hang_up(connection: socket.socket, _: threading.Event) -> None:
    """Take a request, and close without a byte."""
    read_request(connection)


def hang_up_midway(connection: socket.socket, _: threading.Event) -> None:
    """Close after a part of the answer."""
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")


def in_turn(*scripts: Sequence[Serve]) -> Serve:
    """Serves each connection by the next script, a request at a time, and then closes it."""
    remaining = iter(scripts)

    def serve(connection: socket.socket, stopping: threading.Event) -> None:
        for step in next(remaining):
            step(connection, stopping)

    return serve


def get(outbound: Outbound, peer: Peer, *, repeatable: bool = True) -> Answer:
    return outbound.request("GET", peer.url, provider_id="p", timeouts=_TIMEOUTS, repeatable=repeatable)


def test_a_connection_is_kept_for_the_next_lookup() -> None:
    with Peer(in_turn([_ANSWER] * 3)) as peer, make_outbound(peer.address) as outbound:
        assert [get(outbound, peer).status for _ in range(3)] == [200] * 3
        assert peer.connections == 1


def test_what_may_not_be_repeated_has_a_connection_of_its_own() -> None:
    with Peer(in_turn(*[[_ANSWER]] * 3)) as peer, make_outbound(peer.address) as outbound:
        for _ in range(3):
            get(outbound, peer, repeatable=False)
        assert peer.connections == 3


def test_providers_share_no_connection() -> None:
    with Peer(in_turn([_ANSWER], [_ANSWER])) as peer, make_outbound(peer.address) as outbound:
        for provider_id in ("p", "q"):
            outbound.request("GET", peer.url, provider_id=provider_id, timeouts=_TIMEOUTS, repeatable=True)
        assert peer.connections == 2


@pytest.mark.parametrize(
    ("first", "second", "connections"),
    [
        # Whether the close is seen before or after the request is sent, the answer is the same.
        ([_ANSWER], [_ANSWER], 2),
        ([_ANSWER, hang_up], [_ANSWER], 2),
    ],
    ids=["closed while idle", "closed at the request"],
)
def test_a_dead_connection_is_replaced(first: list[Serve], second: list[Serve], connections: int) -> None:
    with Peer(in_turn(first, second)) as peer, make_outbound(peer.address) as outbound:
        assert [get(outbound, peer).body for _ in range(2)] == [b'{"id":"ada"}'] * 2
        assert peer.connections == connections


@pytest.mark.parametrize(
    ("scripts", "connections"),
    [
        ([[hang_up], [_ANSWER]], 1),
        ([[_ANSWER, hang_up_midway], [_ANSWER]], 1),
        ([[_ANSWER, hang_up], [hang_up], [_ANSWER]], 2),
    ],
    ids=["a new connection", "an answer that has begun", "the repetition"],
)
def test_what_is_not_repeated(scripts: list[list[Serve]], connections: int) -> None:
    with Peer(in_turn(*scripts)) as peer, make_outbound(peer.address) as outbound:
        with pytest.raises(ProviderUnavailable):
            [get(outbound, peer) for _ in range(2)]
        assert peer.connections == connections


@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad", b"bad"], ids=["answer", "bytes"])
def test_what_a_peer_sends_unasked_answers_nothing(extra: bytes) -> None:
    """It comes with an answer, before the next request, which must not take it for its own."""

    def answer_and_more(connection: socket.socket, stopping: threading.Event) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood" + extra)

    with Peer(in_turn([answer_and_more], [_ANSWER])) as peer, make_outbound(peer.address) as outbound:
        assert get(outbound, peer).body == b"good"
        assert get(outbound, peer).body == b'{"id":"ada"}'


def test_the_guard_judges_kept_connections_too() -> None:
    """An address that is not allowed is never connected to, so nothing can be kept."""
    with Peer(in_turn([_ANSWER])) as peer, make_outbound() as outbound:
        with pytest.raises(ProviderUnavailable):
            get(outbound, peer)
        assert peer.connections == 0
