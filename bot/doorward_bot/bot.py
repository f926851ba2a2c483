"""The bot: where settings become objects, and what ends it. Imports everything else."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import disnake
from disnake.ext import commands
from disnake.http import Route

from doorward_bot import health
from doorward_bot.backoff import Backoff
from doorward_bot.broker import Broker
from doorward_bot.consent import Consent
from doorward_bot.errors import BotError
from doorward_bot.keys import Keys
from doorward_bot.logs import Log, describe, make_log
from doorward_bot.metrics import Metrics
from doorward_bot.poller import Poller
from doorward_bot.settings import Settings
from doorward_bot.sharing import Sharing
from doorward_bot.tls import read_credentials

_BAD_TOKEN = "Discord does not take DISCORD_TOKEN (any more): make a new one in its developer portal"  # noqa: S105
_INVALID_TOKEN = 4004
_UNAUTHORIZED = 401
# Seconds.
_CLOSING = 1.0


class Bot(commands.InteractionBot):
    """disnake's bot, whose failures are logged without their texts."""

    def __init__(self, log: Log) -> None:
        # Direct messages alone: their content needs no privileged intent. Nothing is kept of what passes through.
        super().__init__(
            intents=disnake.Intents(dm_messages=True),
            max_messages=None,
            guild_ready_timeout=0,  # no guilds are told of
            allowed_mentions=disnake.AllowedMentions.none(),
        )
        self.log = log
        # disnake's own word, `is_ready`, stays true while it tries to connect again.
        self.is_connected = False

    async def on_connect(self) -> None:
        self.is_connected = True
        self.log.info("connected to Discord")

    async def on_resumed(self) -> None:
        await self.on_connect()

    async def on_disconnect(self) -> None:
        self.is_connected = False
        self.log.warning("disconnected from Discord")

    async def on_error(self, event_method: str, *_args: Any, **_options: Any) -> None:
        """A listener failed."""
        failure = sys.exc_info()[1]
        assert failure is not None  # noqa: S101 - disnake calls this while it handles one
        self.log.error("listener failed", listener=event_method, **describe(failure))

    async def on_slash_command_error(self, _inter: Any, failure: commands.CommandError) -> None:
        """A command failed."""
        self.log.error("command failed", **describe(failure.__cause__ or failure))


async def run(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises BotError when it cannot go on."""
    log = make_log(settings.doorward_log_level)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: _log_unawaited(log, context))
    Route.BASE = settings.discord_api_base
    token = settings.discord_token.get_secret_value()
    server_token = settings.doorward_bot_token.get_secret_value()
    async with Broker(settings.server, read_credentials(settings), server_token) as broker:
        bot, metrics = Bot(log), Metrics()
        consent = Consent(bot, broker, log, metrics)
        poller = Poller(broker, consent, log, metrics)
        for cog in (consent, Keys(broker, consent), Sharing(broker)):
            bot.add_cog(cog)

        def state() -> dict[str, bool]:
            return {"discord": bot.is_connected, "server": broker.is_reached}

        metrics.watch(state, lambda: poller.under_way)
        async with _health(settings.doorward_bot_health_port, state, metrics):
            await _until_one_ends(bot, _discord(bot, token, log), _poll(bot, poller), _stopped())
        log.info("stopped")


def _log_unawaited(log: Log, context: dict[str, Any]) -> None:
    """Tasks of disnake's fail that nobody awaits; by default, their exceptions' texts would be printed."""
    failure = context.get("exception")
    log.error("task failed", reason=context["message"], **(describe(failure) if failure else {}))


@contextlib.asynccontextmanager
async def _health(port: int, state: Callable[[], dict[str, bool]], metrics: Metrics) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as opened:
        try:
            await opened.enter_async_context(health.served(port, state, metrics.registry))
        except OSError as failure:
            reason = os.strerror(failure.errno or 0)
            raise BotError(f"DOORWARD_BOT_HEALTH_PORT: cannot listen on port {port}: {reason}") from None
        yield


async def _until_one_ends(bot: Bot, *steps: Any) -> None:
    tasks = [asyncio.create_task(step) for step in steps]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    # Before the others are canceled, and oftener than once: a connection that breaks at this very moment swallows
    # that, and disnake connects again as long as it is not closed.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(bot.close(), _CLOSING)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CLOSING)
    for task in done:
        task.result()


async def _stopped() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


async def _poll(bot: Bot, poller: Poller) -> None:
    # Whoever cannot send takes nothing: its lease would only keep others from it.
    await bot.wait_until_ready()
    await poller.run()


async def _discord(bot: Bot, token: str, log: Log) -> None:
    """Log in, however long Discord is away, and stay connected."""
    backoff = Backoff(1.0, 60.0)
    while not bot.is_closed():
        try:
            await bot.login(token)
            await bot.connect()
        except disnake.LoginFailure:
            raise BotError(_BAD_TOKEN) from None
        except disnake.PrivilegedIntentsRequired:
            raise BotError("Discord refuses the bot's intents, which need no privilege: please report this") from None
        except disnake.ConnectionClosed as closed:
            if closed.code == _INVALID_TOKEN:
                raise BotError(_BAD_TOKEN) from None
            raise BotError(f"Discord closed the connection for good (code {closed.code})") from None
        except disnake.HTTPException as failure:
            if failure.status == _UNAUTHORIZED:
                raise BotError(_BAD_TOKEN) from None
            reason = f"HTTP {failure.status}"
        except (TimeoutError, OSError, aiohttp.ClientError, disnake.GatewayNotFound) as failure:
            reason = type(failure).__name__
        except Exception as failure:  # noqa: BLE001 - Discord answers with nonsense: it may come to its senses
            log.error("Discord makes no sense", **describe(failure))
            reason = type(failure).__name__
        else:
            return
        await bot.http.close()
        pause = backoff.next()
        log.warning("Discord away", reason=reason, seconds=round(pause, 2))
        await asyncio.sleep(pause)
