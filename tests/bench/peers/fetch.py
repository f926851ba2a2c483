"""Bare GETs or POSTs with httpx, as an application of a few lines would make them: one client, so many threads.

Prints one line of JSON: `answers`, `seconds` and `cpu` (seconds). Imports nothing of Doorward's.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx


def _get(client: httpx.Client, url: str, number: int) -> None:
    token = f"bare-{number}"
    answer = client.get(url.format(access_token=token))
    assert answer.json() == {"id": token}, answer.text


def _post(client: httpx.Client, url: str, number: int) -> None:
    fields = {"userid": "80351110224678912", "state": f"bare-{number}", "api_keys": "EXAMPLE-KEY"}
    assert client.post(url, data=fields).is_success


def _repeat(send: Callable[[int], None], until: float) -> int:
    """Send until then; returns how often."""
    for number in itertools.count(1):
        send(number)
        if time.monotonic() > until:
            return number
    raise AssertionError


def _run(send: Callable[[int], None], threads: int, seconds: float) -> dict[str, float]:
    started, cpu = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        counts = pool.map(lambda _: _repeat(send, started + seconds), range(threads))
    return {
        "answers": sum(counts),
        "seconds": time.monotonic() - started,
        "cpu": time.process_time() - cpu,
    }


def main() -> None:
    """Warm up, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="with {access_token} in it, unless it is for POSTs")
    parser.add_argument("--post", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warm-up", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    limits = httpx.Limits(max_connections=options.threads, max_keepalive_connections=options.threads)
    with httpx.Client(trust_env=False, limits=limits) as client:
        send = partial(_post if options.post else _get, client, options.url)
        _run(send, options.threads, options.warm_up)
        print(json.dumps(_run(send, options.threads, options.seconds)))


if __name__ == "__main__":
    main()
