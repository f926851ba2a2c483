"""What the bot tells a monitoring system, beside its health."""

import re
from pathlib import Path

import httpx

from tests.bot.conftest import make_scene
from tests.processes import await_condition, free_port
from tests.scraping import Samples, scrape


def test_the_bot_counts_what_it_does(tmp_path: Path) -> None:
    port = free_port()
    with make_scene(tmp_path) as scene, scene.bot(DOORWARD_BOT_HEALTH_PORT=str(port)) as bot:
        _await(port, "doorward_bot_server_reached", 1)
        assert scrape(port)["doorward_bot_discord_connected"] == 1

        clicker, typist, refuser = scene.person(), scene.person(), scene.person()
        for person in (clicker, typist):
            person.keep("a-key-of-" + person.user.name)
        clicker.ask()
        clicker.user.click(clicker.prompt(), "Share all")
        clicker.outcome()
        typist.ask()
        typist.prompt()
        typist.user.say("rather not")
        typist.outcome()
        refuser.user.refuse()
        refuser.ask()
        refuser.outcome()

        _await(port, 'doorward_bot_answers_total{by="pressed",outcome="granted"}', 1)
        _await(port, 'doorward_bot_answers_total{by="typed",outcome="canceled"}', 1)
        _await(port, 'doorward_bot_prompts_total{outcome="sent"}', 2)
        _await(port, 'doorward_bot_prompts_total{outcome="refused"}', 1)
        _await(port, 'doorward_bot_discord_failures_total{status="403"}', 1)
        _await(port, "doorward_bot_prompts_under_way", 0)
        seen = scrape(port)
        assert seen["doorward_bot_leased_total"] >= 3
        assert seen["process_resident_memory_bytes"] > 0

        page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        assert page.headers["content-type"].startswith("text/plain; version=")
        told = set(re.findall(r'="([^"]*)"', page.text))
        assert not [value for value in told if re.search(r"[0-9]{6}|127\.0\.0\.1|a-key", value)]
        assert bot.stop() == 0


def _await(port: int, name: str, value: float) -> None:
    def seen() -> Samples:
        return scrape(port)

    await_condition(lambda: seen().get(name) == value, f"{name} {value}")
