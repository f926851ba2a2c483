"""Bare GETs with httpx, as an application of a few lines would make them: one client, so many threads.

Prints one line of JSON: `answers`, `seconds` and `cpu` (seconds). Imports nothing of Doorward's.
"""

import argparse
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx


def _fetch(client: httpx.Client, url: str, until: float) -> int:
    """GET and read until then; returns how often."""
    for number in itertools.count(1):
        token = f"bare-{number}"
        answer = client.get(url.format(access_token=token))
        assert answer.json() == {"id": token}, answer.text
        if time.monotonic() > until:
            return number
    raise AssertionError


def _run(client: httpx.Client, url: str, threads: int, seconds: float) -> dict[str, float]:
    started, cpu = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        counts = pool.map(lambda _: _fetch(client, url, started + seconds), range(threads))
    return {
        "answers": sum(counts),
        "seconds": time.monotonic() - started,
        "cpu": time.process_time() - cpu,
    }


def main() -> None:
    """Warm up, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="with {access_token} in it")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warm-up", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    limits = httpx.Limits(max_connections=options.threads, max_keepalive_connections=options.threads)
    with httpx.Client(trust_env=False, limits=limits) as client:
        _run(client, options.url, options.threads, options.warm_up)
        print(json.dumps(_run(client, options.url, options.threads, options.seconds)))


if __name__ == "__main__":
    main()
