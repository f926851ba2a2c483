"""An instant provider: its lookup answers at once, with the access token as the account's id.

It speaks as much HTTP/1.1 as a client's GET needs, for whatever it cost more would slow down all contenders alike.
"""

import argparse
import asyncio
import contextlib

_ANSWER = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n{"id":"%s"}'
_AROUND_ID = len(b'{"id":""}')


class _Lookup(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, self._data = self._data.partition(b"\r\n\r\n")
            token = head.split(b" ", 2)[1].partition(b"=")[2]
            self._transport.write(_ANSWER % (len(token) + _AROUND_ID, token))


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Lookup, "127.0.0.1", port, backlog=1024)
    print("serving", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Serve on a port of 127.0.0.1 until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
