"""Consent: asks users in direct messages, and takes their answers. Imports `prompts`, `discord`, `broker` and below.

Whatever a user decides is recorded by the server first, and shown in the message afterwards.
"""

import asyncio
import math
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC
from typing import Any, TypeAlias

import disnake
from disnake.ext import commands
from disnake.interactions.message import MessageInteraction

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward_bot import messages
from doorward_bot.broker import Away, Broker, NotAdmitted, Refused
from doorward_bot.discord import CannotAsk, Dms, Message
from doorward_bot.locks import Locks
from doorward_bot.logs import Log, describe
from doorward_bot.metrics import Metrics
from doorward_bot.prompts import PAGE, Place, Press, Prompt, choose, decode, ended, fits, parse_answer

# Seconds for which a user's answer waits for a server that is away.
_PATIENCE = 60.0
# Seconds after which a user who has pressed something is told that it takes longer.
_SILENCE = 4.0
# Seconds for which Discord itself waits.
_ACKNOWLEDGED = 3.0
_KEY_GONE = "KEY_NOT_FOUND"
_PEOPLES = {disnake.MessageType.default.value, disnake.MessageType.reply.value}
_OPEN = {pb.CONSENT_STATUS_PENDING, pb.CONSENT_STATUS_PROMPTED}
_RECENT = 100
_Status: TypeAlias = pb.ConsentStatus.ValueType


class Consent(commands.Cog):
    """The prompts, from the lease to the end."""

    def __init__(self, bot: commands.InteractionBot, broker: Broker, log: Log, metrics: Metrics) -> None:
        self._bot = bot
        self._broker = broker
        self._log = log
        self._metrics = metrics
        self._dms = Dms(bot.http, metrics)
        self._locks = Locks()

    # Prompts

    async def take(self, leased: pb.LeasedConsentRequest) -> None:
        """Send or close a prompt that was leased. What fails is leased again."""
        async with self._locks.of(int(leased.request.discord_user_id)):
            if leased.request.status in _OPEN:
                await self._prompt(leased)
            else:
                await self._close(leased.request, leased.request.status)

    async def refresh(self, user_id: int) -> None:
        """Let the open prompts of a user show the keys that were added."""
        async with self._locks.of(user_id):
            wanted = pb.ListConsentRequestsRequest(
                discord_user_id=str(user_id), only_prompted=True, max_requests=_RECENT
            )
            answer = await self._broker.call("ListConsentRequests", wanted)
            for request_id in {leased.request.message: leased.request.id for leased in answer.requests}.values():
                await self._show(request_id)

    async def _prompt(self, leased: pb.LeasedConsentRequest) -> None:
        request = leased.request
        try:
            channel_id = await self._dms.open(int(request.discord_user_id))
            # An earlier lease may have ended after Discord took the prompt, and before the server heard of it.
            found = await self._find(request, channel_id) if leased.lease_epoch > 1 else None
            place = found or await self._send(leased, channel_id)
        except CannotAsk:
            await self._resolve(request.id, blocked=pb.Blocked())
            await self._broker.call("ClosePrompt", pb.ClosePromptRequest(request_id=request.id))
            self._metrics.prompt_ended("refused")
            self._log.info("user cannot be asked", request_id=request.id)
            return
        if not await self._mark(request.id, leased.lease_epoch, place):
            await self._show(request.id, place)
        elif found:
            await self._show(request.id)
            await self._read_replies(found)

    async def _send(self, leased: pb.LeasedConsentRequest, channel_id: int) -> Place:
        payload = Prompt(leased.request, leased.keys).payload()
        message_id = await self._dms.send(
            channel_id, payload, nonce=f"{leased.request.prompt_id}-{leased.request.create_time.seconds}"
        )
        self._metrics.prompt_ended("sent")
        self._log.info("prompted", request_id=leased.request.id)
        return Place(channel_id, message_id, tuple(key.id for key in leased.keys))

    async def _find(self, request: pb.ConsentRequest, channel_id: int) -> Place | None:
        """Where an earlier attempt has put a prompt, as its components tell."""
        # The prompt was open when this request joined it, so it is older by one lifetime of a request at most.
        asked_at, deadline = request.create_time.ToDatetime(UTC), request.deadline_time.ToDatetime(UTC)
        since = disnake.utils.time_snowflake(asked_at - (deadline - asked_at))
        async for message in self._dms.history(channel_id, since):
            if self._is_mine(message) and (place := _place_of(message, request.prompt_id)):
                return place
        return None

    async def _mark(self, request_id: int, lease_epoch: int, place: Place) -> bool:
        """Tell the server where a prompt is; False when it has ended meanwhile, or another bot has it."""
        marked = pb.MarkPromptedRequest(request_id=request_id, lease_epoch=lease_epoch, message=str(place))
        try:
            await self._broker.call("MarkPrompted", marked, patience=_PATIENCE)
        except Refused as refused:
            if refused.reason not in {"REQUEST_FINISHED", "LEASE_LOST"}:
                raise
            return False
        return True

    async def _show(self, request_id: int, place: Place | None = None) -> None:
        """Let the message of a prompt, if it is not elsewhere, show what is so now."""
        found = await self._get(request_id)
        place = Place.parse(found.request.message) or place
        if place is None:
            return
        if not found.prompt_open:
            await self._dms.edit(place.channel_id, place.message_id, ended(found.request, found.request.status))
            return
        # Numbers stay what they were; what is new comes at the end.
        key_ids = _with_others(place.key_ids, found.keys)
        if key_ids != place.key_ids and not await self._mark(
            request_id, found.lease_epoch, place._replace(key_ids=key_ids)
        ):
            return
        await self._dms.edit(place.channel_id, place.message_id, _prompt(found.request, key_ids, found.keys).payload())

    async def _close(self, request: pb.ConsentRequest, status: _Status, labels: Sequence[str] = ()) -> None:
        """Show in its message how a request ended."""
        place = Place.parse(request.message) or await self._find_lost(request)
        if place is not None:
            await self._dms.edit(place.channel_id, place.message_id, ended(request, status, labels))
        await self._broker.call("ClosePrompt", pb.ClosePromptRequest(request_id=request.id))

    async def _find_lost(self, request: pb.ConsentRequest) -> Place | None:
        """Where a prompt was put that ended before the server heard of it."""
        try:
            return await self._find(request, await self._dms.open(int(request.discord_user_id)))
        except CannotAsk:
            return None

    # What a user has decided

    async def _decide(
        self, prompt: Prompt, chosen: Sequence[pb.ApiKey] | None, by: str
    ) -> pb.ResolveConsentRequestResponse:
        """Share keys, or cancel; returns how the request ended, now or before. Raises Refused when a key is gone."""
        if chosen is None:
            outcome = await self._resolve(prompt.request.id, canceled=pb.Canceled())
        else:
            granted = pb.GrantedKeys(key_ids=[key.id for key in chosen])
            outcome = await self._resolve(prompt.request.id, granted=granted)
        self._metrics.answered(by, _counted_as(outcome.decided, chosen))
        self._log.info("decided", request_id=prompt.request.id, status=pb.ConsentStatus.Name(outcome.status))
        labels = [key.label for key in chosen or ()] if outcome.decided else []
        try:
            await self._close(prompt.request, outcome.status, labels)
        except Exception as failure:  # noqa: BLE001 - it counts all the same; the server gives it out to be closed
            self._log.warning("cannot show the outcome", request_id=prompt.request.id, **describe(failure))
        return outcome

    async def _resolve(self, request_id: int, **outcome: Any) -> pb.ResolveConsentRequestResponse:
        wanted = pb.ResolveConsentRequestRequest(request_id=request_id, **outcome)
        return await self._broker.call("ResolveConsentRequest", wanted, patience=_PATIENCE)  # type: ignore[no-any-return]

    async def _get(self, request_id: int) -> pb.GetConsentRequestResponse:
        wanted = pb.GetConsentRequestRequest(request_id=request_id)
        return await self._broker.call("GetConsentRequest", wanted, patience=_PATIENCE)  # type: ignore[no-any-return]

    # What is typed

    @commands.Cog.listener()
    async def on_message(self, message: disnake.Message) -> None:
        """Only people's direct messages matter."""
        if message.guild is None and not message.author.bot and message.type.value in _PEOPLES:
            async with self._locks.of(message.author.id):
                await self._take_typed(_raw(message))

    @commands.Cog.listener()
    async def on_ready(self) -> None:
        """Find what users typed while nobody listened: Discord does not tell again."""
        before_id = 0
        while True:
            wanted = pb.ListConsentRequestsRequest(only_prompted=True, max_requests=100, before_id=before_id)
            try:
                answer = await self._broker.call("ListConsentRequests", wanted, patience=math.inf)
            except NotAdmitted:  # the poller tells
                return
            for leased in answer.requests:
                await self._catch_up(leased)
            if not answer.requests:
                return
            before_id = answer.requests[-1].request.id

    async def _catch_up(self, leased: pb.LeasedConsentRequest) -> None:
        if (place := Place.parse(leased.request.message)) is None:
            return
        try:
            async with self._locks.of(int(leased.request.discord_user_id)):
                try:
                    await self._read_replies(place)
                except disnake.NotFound:  # Discord has lost the prompt, as the stand-in does when it ends
                    await self._prompt(leased)
        except disnake.HTTPException as failure:
            self._log.warning("cannot read replies", request_id=leased.request.id, **describe(failure))

    async def _read_replies(self, place: Place) -> None:
        """Take what the user typed after a prompt, and what no reply of the bot's answers."""
        typed: dict[str, Message] = {}
        async for message in self._dms.history(place.channel_id, place.message_id):
            if self._is_mine(message):
                typed.pop(_replied_to(message), None)
            elif message["type"] in _PEOPLES:
                typed[message["id"]] = message
        for message in typed.values():
            await self._take_typed(message)

    async def _take_typed(self, message: Message) -> None:
        try:
            prompt = await self._prompt_for(message)
            told = await self._answer_typed(message, prompt) if isinstance(prompt, Prompt) else prompt
        except Away:
            told = messages.AWAY
        except Refused:
            told = messages.FAILED
        if told:
            try:
                await self._dms.reply(message, told)
            except CannotAsk:
                self._log.info("user cannot be told")

    async def _prompt_for(self, message: Message) -> Prompt | str | None:
        """The prompt that a message answers: which it replies to, or the only open one; or what to tell the user."""
        requests = [
            leased
            for only_prompted in (False, True)  # however many have ended since, none that is open is overlooked
            for leased in await self._requests_of(message["author"]["id"], only_prompted=only_prompted)
        ]
        # Requests that share a prompt are one here: the open one, or the last to end.
        recent = sorted(requests, key=lambda one: one.request.finish_time.ToNanoseconds() or math.inf)
        # Nobody answers what was not there yet.
        of_message = {
            str(place.message_id): leased
            for leased in recent
            if (place := Place.parse(leased.request.message)) and place.message_id < int(message["id"])
        }
        # Those that waited when it was typed, for it may be found much later.
        typed_at = disnake.utils.snowflake_time(int(message["id"])).timestamp()
        waiting = [
            leased
            for leased in of_message.values()
            if leased.request.status in _OPEN or leased.request.finish_time.ToMilliseconds() / 1000 > typed_at
        ]
        if replied_to := _replied_to(message):
            if replied_to in of_message:
                waiting = [of_message[replied_to]]
            elif (message.get("referenced_message") or {}).get("embeds"):  # a prompt of long ago
                waiting = []
        if not waiting:
            return None
        if len(waiting) > 1:
            return messages.SEVERAL
        request = waiting[0].request
        if request.status not in _OPEN:
            return messages.LATE + messages.end(request.status)
        place = Place.parse(request.message)
        return _prompt(request, place.key_ids if place else (), waiting[0].keys)

    async def _requests_of(self, user_id: str, *, only_prompted: bool) -> Sequence[pb.LeasedConsentRequest]:
        wanted = pb.ListConsentRequestsRequest(
            discord_user_id=user_id, only_prompted=only_prompted, max_requests=_RECENT
        )
        answer = await self._broker.call("ListConsentRequests", wanted, patience=_PATIENCE)
        return answer.requests  # type: ignore[no-any-return]

    async def _answer_typed(self, message: Message, prompt: Prompt) -> str:
        chosen = parse_answer(message["content"], prompt.keys)
        try:
            outcome = await self._decide(prompt, chosen, "typed")
        except Refused as refused:
            return _sorry(refused)
        if not outcome.decided:
            return messages.LATE + messages.end(outcome.status)
        if chosen is None:
            return messages.INVALID_CHOICE if any(prompt.keys) else messages.NOTHING_TO_CHOOSE
        return messages.end(outcome.status, [key.label for key in chosen])

    def _is_mine(self, message: Message) -> bool:
        return int(message["author"]["id"]) == self._bot.user.id

    # What is pressed

    @commands.Cog.listener()
    async def on_message_interaction(self, inter: MessageInteraction[Any]) -> None:
        """A button was pressed, or something chosen in a menu."""
        # Not of `inter.component`, which fails when the message does not show it any more.
        press = Press.parse(inter.data.custom_id)
        if press is None:
            return
        # First of all: Discord waits for three seconds. A decision counts even if this comes too late for that.
        await self._try(inter.response.defer())
        taking = asyncio.create_task(self._take_in_turn(inter, press))
        done, _ = await asyncio.wait([taking], timeout=_SILENCE)
        if not done:
            await self._try(inter.followup.send(messages.HOLD_ON, ephemeral=True))
        if told := await taking:
            await self._try(inter.followup.send(told, ephemeral=True))

    async def _take_in_turn(self, inter: MessageInteraction[Any], press: Press) -> str | None:
        async with self._locks.of(inter.author.id):
            try:
                return await self._take_press(inter, press)
            except Away:
                return messages.AWAY

    async def _take_press(self, inter: MessageInteraction[Any], press: Press) -> str | None:
        """Returns what to tell the user, beside what the message shows."""
        try:
            found = await self._get(press.prompt_id)
        except Refused as refused:
            return messages.NOT_KNOWN if refused.reason == "CONSENT_REQUEST_NOT_FOUND" else messages.FAILED
        if found.request.discord_user_id != str(inter.author.id):
            return messages.NOT_YOURS
        place = Place.parse(found.request.message) or _place_of(_raw(inter.message), press.prompt_id)
        if place is None:
            return messages.NOT_KNOWN
        if not found.prompt_open:
            if await self._dms.can_be_pressed(place.channel_id, place.message_id):  # somebody's edit was late
                await self._show(press.prompt_id, place)
            return messages.LATE + messages.end(found.request.status)
        if not found.request.message:  # it was sent by a bot that died before it told the server
            # Of the keys it shows but a page; the others follow, in the order of their ids.
            place = place._replace(key_ids=_with_others(place.key_ids, found.keys))
            await self._mark(press.prompt_id, found.lease_epoch, place)
            found.request.message = str(place)
        prompt = _prompt(found.request, place.key_ids, found.keys)
        if press.action in {"pick", "page"}:
            return await self._turn(inter, press, prompt, place)
        return await self._answer_press(press, prompt)

    async def _answer_press(self, press: Press, prompt: Prompt) -> str | None:
        selected = decode(press.argument, len(prompt.keys)) if press.action == "share" else range(len(prompt.keys))
        chosen = [prompt.keys[index] for index in selected]
        there = [key for key in chosen if key is not None]
        is_gone = not there or (press.action == "share" and len(there) < len(chosen))
        try:
            if press.action == "cancel":
                await self._decide(prompt, None, "pressed")
                return None
            if not is_gone:
                await self._decide(prompt, there, "pressed")
                return None
        except Refused as refused:
            if refused.reason != _KEY_GONE:
                return messages.FAILED
        await self._show(press.prompt_id)
        return messages.KEY_GONE

    async def _turn(self, inter: MessageInteraction[Any], press: Press, prompt: Prompt, place: Place) -> str | None:
        """Show another selection, or another page; what is selected stands in the message."""
        page = min(int(press.argument or 0), max(0, len(prompt.keys) - 1) // PAGE)
        prompt = replace(prompt, page=page, selection=_selection(_raw(inter.message), len(prompt.keys)))
        if press.action == "pick":
            selection = choose(prompt, [int(value) for value in inter.values or ()])
            if not fits(selection):
                return messages.FULL
            prompt = replace(prompt, selection=selection)
        await self._dms.edit(place.channel_id, place.message_id, prompt.payload())
        return None

    async def _try(self, step: Awaitable[Any]) -> None:
        """Discord may have forgotten the interaction, or hang: what was decided counts all the same."""
        try:
            await asyncio.wait_for(step, _ACKNOWLEDGED)
        except Exception as failure:  # noqa: BLE001
            self._metrics.discord_failed(failure)
            self._log.warning("interaction lost", **describe(failure))


def _counted_as(decided: bool, chosen: Sequence[pb.ApiKey] | None) -> str:
    if not decided:
        return "late"
    return "canceled" if chosen is None else "granted"


def _sorry(refused: Refused) -> str:
    return messages.KEY_GONE if refused.reason == _KEY_GONE else messages.FAILED


def _with_others(key_ids: Sequence[int], keys: Sequence[pb.ApiKey]) -> tuple[int, ...]:
    """Ids, and those of the other keys after them."""
    return tuple(dict.fromkeys([*key_ids, *(key.id for key in keys)]))


def _prompt(request: pb.ConsentRequest, key_ids: Sequence[int], keys: Sequence[pb.ApiKey]) -> Prompt:
    by_id = {key.id: key for key in keys}
    return Prompt(request, [by_id.get(key_id) for key_id in key_ids])


# Messages, as Discord's API has them


def _raw(message: disnake.Message) -> Message:
    reference = message.reference
    replied_to = reference.resolved if reference else None
    return {
        "id": str(message.id),
        "channel_id": str(message.channel.id),
        "content": message.content,
        "author": {"id": str(message.author.id)},
        "components": [row.to_dict() for row in message.components],
        "message_reference": {"message_id": str(reference.message_id)} if reference and reference.message_id else None,
        "referenced_message": {"embeds": replied_to.embeds} if isinstance(replied_to, disnake.Message) else None,
    }


def _replied_to(message: Message) -> str:
    """The id of the message that one replies to; "" when it replies to none."""
    return str((message.get("message_reference") or {}).get("message_id") or "")


def _components(message: Message) -> Iterator[dict[str, Any]]:
    for row in message.get("components") or ():
        yield from row.get("components", ())


def _place_of(message: Message, prompt_id: int) -> Place | None:
    """Where a prompt is, when this message is that prompt."""
    components = [*_components(message)]
    presses = [Press.parse(component.get("custom_id")) for component in components]
    if not any(press and press.prompt_id == prompt_id for press in presses):
        return None
    options = [option for component in components for option in component.get("options") or ()]
    return Place(int(message["channel_id"]), int(message["id"]), tuple(int(option["value"]) for option in options))


def _selection(message: Message, keys: int) -> tuple[int, ...]:
    """What is selected, as the button to share it tells."""
    for component in _components(message):
        press = Press.parse(component.get("custom_id"))
        if press and press.action == "share":
            return decode(press.argument, keys)
    return ()
