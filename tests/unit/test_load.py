"""The bench's load generator at a fixed rate: what it must not hide."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.bench import load

_REQUEST = b"GET / HTTP/1.1\r\n\r\n"
_RATE, _SECONDS, _STALL = 200.0, 1.0, 0.4
_CONNECTIONS = 4


@contextlib.contextmanager
def _server(answer: Callable[[int], bytes]) -> Iterator[tuple[str, int]]:
    """Serves one request at a time, whatever the connection; `answer` is told how many came before."""
    turn, numbers = threading.Lock(), itertools.count()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(len(_REQUEST)):
                with turn:
                    body = answer(next(numbers))
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body)

    def accept() -> None:
        for _ in range(_CONNECTIONS):
            connection, _ = listener.accept()
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield listener.getsockname()
        for thread in (accepting, *threads):
            thread.join()


def _run(answer: Callable[[int], bytes]) -> load.Result:
    with _server(answer) as address:
        connections = [load.HttpConnection(address, itertools.repeat(_REQUEST), b"ok") for _ in range(_CONNECTIONS)]
        try:
            return load.run_at_rate(connections, _RATE, _SECONDS)
        finally:
            load.close(connections)


def test_a_stall_counts_for_every_request_that_it_holds_up() -> None:
    def answer(number: int) -> bytes:
        if number == 20:
            threading.Event().wait(_STALL)
        return b"ok"

    result = _run(answer)
    assert result.answers == len(result.latencies) == _RATE * _SECONDS
    assert result.latencies[-1] >= _STALL
    # Those that were due in the first half of the stall waited for the second half at least, though
    # only as many as there are connections were sent before its end.
    late = sum(latency >= _STALL / 2 for latency in result.latencies)
    assert late >= _RATE * _STALL / 2 - 1


def test_a_wrong_answer_ends_the_run() -> None:
    with pytest.raises(load.WrongAnswer, match="no'"):
        _run(lambda number: b"no" if number == 20 else b"ok")
