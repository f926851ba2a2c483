"""Gateway version 10: connections, sessions that outlive them, and the events that each gets.

Several connections may stand at once, as those of two bots with one token; each gets every event that it asked for.
"""

import asyncio
import json
import secrets
import time
import zlib
from collections import deque
from collections.abc import Callable

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from . import render
from .checks import Identify, Presence, Resume, check
from .errors import DiscordError, Json
from .state import APPLICATION_ID, GUILD_ID, WORLD, Message, World

PATH = "/gateway"
DISPATCH, HEARTBEAT, IDENTIFY, PRESENCE, RESUME, RECONNECT = 0, 1, 2, 3, 6, 7
INVALID_SESSION, HELLO, HEARTBEAT_ACK = 9, 10, 11

UNKNOWN_OPCODE, DECODE_ERROR, NOT_AUTHENTICATED, AUTHENTICATION_FAILED = 4001, 4002, 4003, 4004
ALREADY_AUTHENTICATED, INVALID_SEQUENCE, RATE_LIMITED, SESSION_TIMED_OUT = 4005, 4007, 4008, 4009
INVALID_SHARD, INVALID_VERSION, INVALID_INTENTS, DISALLOWED_INTENTS = 4010, 4012, 4013, 4014
# After these, a session cannot be resumed.
ENDS_SESSION = {AUTHENTICATION_FAILED, INVALID_SEQUENCE, SESSION_TIMED_OUT}

GUILDS_INTENT, GUILD_MESSAGES_INTENT, DIRECT_MESSAGES_INTENT = 1 << 0, 1 << 9, 1 << 12
PRIVILEGED_INTENTS = 1 << 1 | 1 << 8 | 1 << 15
KNOWN_INTENTS = (1 << 17) - 1 | 1 << 20 | 1 << 21 | 1 << 24 | 1 << 25

LONGEST_FRAME = 4096
FRAMES_PER_MINUTE = 120
REMEMBERED_EVENTS = 10_000
# A heartbeat may be so many intervals late.
HEARTBEAT_GRACE = 2.0


class Session:
    """What an IDENTIFY began, and what a RESUME takes up again."""

    def __init__(self, intents: int) -> None:
        self.id = secrets.token_hex(16)
        self.intents = intents
        self.sequence = 0
        self.resumes = 0
        self.connection: Connection | None = None
        self._events: deque[Json] = deque(maxlen=REMEMBERED_EVENTS)

    def dispatch(self, event: str, payload: Json) -> None:
        self.sequence += 1
        frame = {"op": DISPATCH, "t": event, "s": self.sequence, "d": payload}
        self._events.append(frame)
        if self.connection is not None:
            self.connection.send(frame)

    def missed_since(self, sequence: int) -> list[Json] | None:
        """The events after one; None when they are not all remembered."""
        missed = [frame for frame in self._events if frame["s"] > sequence]
        return missed if len(missed) == self.sequence - sequence else None


class Gateway:
    """All sessions, and what a test may do to them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sessions: dict[str, Session] = {}
        self.connections: set[Connection] = set()
        self.identified = 0

    def dispatch(self, event: str, payload: Json, intent: int = 0) -> None:
        """Send an event to the sessions that asked for it; to all, when it takes no intent."""
        for session in self.sessions.values():
            if not intent or session.intents & intent:
                session.dispatch(event, payload)

    def dispatch_message(self, event: str, message: Message) -> None:
        """Tell of a message, unless it is ephemeral, which the gateway never is told of."""
        if message.ephemeral:
            return
        payload = render.message(self.world, message)
        if message.channel.recipient is not None:
            self.dispatch(event, payload, DIRECT_MESSAGES_INTENT)
            return
        payload |= {"guild_id": GUILD_ID}
        if message.author is not self.world.bot:
            # Without the privileged intent, a guild's messages come without what they say.
            payload |= {"member": render.member(message.author), "content": "", "embeds": [], "components": []}
        self.dispatch(event, payload, GUILD_MESSAGES_INTENT)

    def dispatch_deletion(self, message: Message) -> None:
        if not message.ephemeral:
            payload = {"id": message.id, "channel_id": message.channel.id}
            self.dispatch("MESSAGE_DELETE", payload, DIRECT_MESSAGES_INTENT)

    # Faults

    def drop(self) -> None:
        """Cut every connection, without a word."""
        for connection in list(self.connections):
            connection.abort()

    def ask_to_reconnect(self) -> None:
        for connection in list(self.connections):
            connection.send({"op": RECONNECT, "d": None})

    def invalidate(self, *, resumable: bool) -> None:
        for session in list(self.sessions.values()):
            if not resumable:
                del self.sessions[session.id]
            if session.connection is not None:
                session.connection.send({"op": INVALID_SESSION, "d": resumable})

    def close(self, code: int) -> None:
        for connection in list(self.connections):
            connection.close(code)


class Closing(Exception):
    """The connection has to be closed, for the bot did what it must not."""

    def __init__(self, code: int, why: str, *, violation: bool = True) -> None:
        super().__init__(why)
        self.code = code
        self.violation = violation


class Connection:
    """One WebSocket, from HELLO to its end."""

    def __init__(self, gateway: Gateway, request: web.Request, socket: web.WebSocketResponse) -> None:
        self.gateway = gateway
        self.session: Session | None = None
        self._world = gateway.world
        self._request = request
        self._socket = socket
        self._outgoing: asyncio.Queue[Json | int] = asyncio.Queue()
        self._frames: deque[float] = deque()
        self._interval = self._world.settings.heartbeat_interval
        self._close_code: int | None = None
        compressed = request.query.get("compress") == "zlib-stream"
        self._compressor = zlib.compressobj() if compressed else None

    def send(self, frame: Json) -> None:
        """Queue a frame; only events have a sequence and a name."""
        self._outgoing.put_nowait({"s": None, "t": None} | frame)

    def close(self, code: int) -> None:
        """Close after everything that is queued."""
        self._close_code = code
        self._outgoing.put_nowait(code)

    def abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    async def run(self) -> None:
        """Talk until the end."""
        writer = asyncio.create_task(self._write())
        self.gateway.connections.add(self)
        self.send({"op": HELLO, "d": {"heartbeat_interval": self._interval}})
        try:
            await self._read()
        finally:
            self.gateway.connections.discard(self)
            self._detach()
            await _drained(writer)

    async def _read(self) -> None:
        while True:
            try:
                frame = await self._socket.receive(timeout=HEARTBEAT_GRACE * self._interval / 1000)
                if frame.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                    return
                self._receive(frame)
            except TimeoutError:
                self.close(SESSION_TIMED_OUT)
                return
            except Closing as closing:
                if closing.violation:
                    self._world.problem(f"gateway: {closing.code} {closing}")
                self.close(closing.code)
                return

    def _receive(self, frame: WSMessage) -> None:
        self._count_frame()
        try:
            if len(frame.data) > LONGEST_FRAME:
                raise ValueError
            message = json.loads(frame.data)
            opcode, data = message["op"], message["d"]
        except (ValueError, TypeError, KeyError):
            raise Closing(DECODE_ERROR, "a frame that is too long or not an object with op and d") from None
        handlers: dict[object, Callable[[object], None]] = {
            HEARTBEAT: self._heartbeat,
            IDENTIFY: self._identify,
            RESUME: self._resume,
            PRESENCE: self._presence,
        }
        if opcode not in handlers:
            raise Closing(UNKNOWN_OPCODE, f"opcode {opcode!r}")
        try:
            handlers[opcode](data)
        except DiscordError as error:
            raise Closing(DECODE_ERROR, f"opcode {opcode}: {error}") from None

    def _count_frame(self) -> None:
        now = time.monotonic()
        self._frames.append(now)
        while self._frames[0] < now - 60:
            self._frames.popleft()
        if len(self._frames) > FRAMES_PER_MINUTE:
            raise Closing(RATE_LIMITED, "more than 120 frames in a minute")

    def _heartbeat(self, sequence: object) -> None:
        known = self.session.sequence if self.session else 0
        if sequence is not None and (not isinstance(sequence, int) or not sequence >= 0):
            raise Closing(DECODE_ERROR, f"a heartbeat with {sequence!r}")
        if self.session and isinstance(sequence, int) and sequence > known:
            raise Closing(INVALID_SEQUENCE, f"a heartbeat with {sequence}, after {known}")
        if self._world.settings.acknowledge_heartbeats:
            self.send({"op": HEARTBEAT_ACK, "d": None})

    def _identify(self, data: object) -> None:
        wish = check(Identify, data)
        self._authenticate(wish.token)
        if wish.shard is not None and not 0 <= wish.shard[0] < wish.shard[1]:
            raise Closing(INVALID_SHARD, f"shard {wish.shard}")
        if wish.intents & ~KNOWN_INTENTS:
            raise Closing(INVALID_INTENTS, f"intents {wish.intents}")
        if wish.intents & PRIVILEGED_INTENTS:
            raise Closing(DISALLOWED_INTENTS, f"intents {wish.intents} are privileged")
        session = Session(wish.intents)
        self.gateway.identified += 1
        self.gateway.sessions[session.id] = session
        self._attach(session)
        session.dispatch("READY", self._ready(session, wish.shard))
        if self._world.settings.guild and session.intents & GUILDS_INTENT:
            session.dispatch("GUILD_CREATE", render.guild(self._world))

    def _ready(self, session: Session, shard: list[int] | None) -> Json:
        in_guild = self._world.settings.guild
        ready: Json = {
            "v": 10,
            "user": render.own_user(self._world.bot),
            "guilds": [{"id": GUILD_ID, "unavailable": True}] if in_guild else [],
            "session_id": session.id,
            "resume_gateway_url": f"ws://{self._request.host}{PATH}",
            "application": {"id": APPLICATION_ID, "flags": 0},
            "private_channels": [],
            "_trace": ["sandbox"],
        }
        return ready | ({"shard": shard} if shard is not None else {})

    def _resume(self, data: object) -> None:
        wish = check(Resume, data)
        self._authenticate(wish.token)
        session = self.gateway.sessions.get(wish.session_id)
        if session is not None and wish.seq > session.sequence:
            raise Closing(INVALID_SEQUENCE, f"RESUME at {wish.seq}, after {session.sequence}")
        missed = session.missed_since(wish.seq) if session is not None else None
        if session is None or missed is None:
            self.send({"op": INVALID_SESSION, "d": False})
            return
        self._attach(session)
        session.resumes += 1
        for frame in missed:
            self.send(frame)
        session.dispatch("RESUMED", {"_trace": ["sandbox"]})

    def _presence(self, data: object) -> None:
        if self.session is None:
            raise Closing(NOT_AUTHENTICATED, "a presence before IDENTIFY")
        check(Presence, data)

    def _authenticate(self, token: str) -> None:
        if self.session is not None:
            raise Closing(ALREADY_AUTHENTICATED, "IDENTIFY or RESUME on a connection that has a session")
        if self._world.token_revoked or token != self._world.token:
            revoked = self._world.token_revoked and token == self._world.token
            raise Closing(AUTHENTICATION_FAILED, "a token that is not the bot's", violation=not revoked)

    def _attach(self, session: Session) -> None:
        if session.connection is not None:
            session.connection.session = None
            session.connection.close(WSCloseCode.GOING_AWAY)
        self.session, session.connection = session, self
        self._world.touch()

    def _detach(self) -> None:
        """Leave the session for a RESUME, unless the bot has said good-bye or the session is spoilt."""
        session = self.session
        if session is None:
            return
        session.connection = None
        good_bye = self._close_code is None and self._socket.close_code in (WSCloseCode.OK, WSCloseCode.GOING_AWAY)
        if good_bye or self._close_code in ENDS_SESSION:
            self.gateway.sessions.pop(session.id, None)
        self._world.touch()

    async def _write(self) -> None:
        while True:
            item = await self._outgoing.get()
            if isinstance(item, int):
                await self._socket.close(code=item)
                return
            await self._send_now(json.dumps(item))

    async def _send_now(self, text: str) -> None:
        if self._compressor is None:
            await self._socket.send_str(text)
            return
        packed = self._compressor.compress(text.encode()) + self._compressor.flush(zlib.Z_SYNC_FLUSH)
        await self._socket.send_bytes(packed)


async def _drained(writer: asyncio.Task[None]) -> None:
    """Let the writer finish a close that is queued; whatever else it waits for is over."""
    done, _ = await asyncio.wait([writer], timeout=0.5)
    if not done:
        writer.cancel()
    await asyncio.gather(writer, return_exceptions=True)


GATEWAY = web.AppKey("gateway", Gateway)


async def connect(request: web.Request) -> web.WebSocketResponse:
    """The one address of the gateway."""
    socket = web.WebSocketResponse(compress=False, timeout=2.0)
    await socket.prepare(request)
    world = request.app[WORLD]
    if (request.query.get("v"), request.query.get("encoding")) != ("10", "json"):
        world.problem(f"gateway: {INVALID_VERSION} {request.query_string}")
        await socket.close(code=INVALID_VERSION)
        return socket
    await Connection(request.app[GATEWAY], request, socket).run()
    return socket
