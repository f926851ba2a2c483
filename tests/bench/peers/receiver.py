"""An instant callback receiver: answers every POST with 204 as soon as its body is there.

It speaks as much HTTP/1.1 as the contenders need, for whatever it cost more would slow them all down alike.
"""

import argparse
import asyncio
import contextlib

_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"
_LENGTH = b"content-length:"


class _Receive(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, rest = self._data.partition(b"\r\n\r\n")
            after = head.lower().partition(_LENGTH)[2]
            length = int(after.partition(b"\r\n")[0])
            if len(rest) < length:
                return
            self._data = rest[length:]
            self._transport.write(_ANSWER)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Receive, "127.0.0.1", port, backlog=1024)
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
