"""GetKaiStatus's route in FastAPI and SQLAlchemy, as one would write it there. Imports nothing of Doorward's.

    PEER_DATABASE=... uvicorn --factory tests.bench.peers.fastapi_app:make_app --workers 2

Of the usual ways to write it this one is the fastest. In one run, answers a second and CPU per answer:
a sync endpoint that opens its session 806, 1,538 µs; the same by dependencies, each of which changes
threads, 517, 2,126 µs; an async one with aiosqlite 633, 2,466 µs.
"""

import hashlib
import os
import time
from typing import Annotated

from fastapi import Cookie, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import BigInteger, ForeignKey, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

_KAI_TYPES = ("flo", "min", "eag")
_THREADS = 40  # those of sync endpoints


class Base(DeclarativeBase):
    """The tables as Doorward made them; only what is read."""


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str]


class LogIn(Base):
    __tablename__ = "sessions"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id))
    token_hash: Mapped[bytes]
    expires_at: Mapped[int] = mapped_column(BigInteger)


class Connection(Base):
    __tablename__ = "connections"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id))
    provider: Mapped[str]
    needs_reauth: Mapped[bool]


class KaiStatus(BaseModel):
    authStatus: bool  # noqa: N815 - the document's name


def find_user_id(session: Session, cookie: str) -> int | None:
    """The user whose live session a cookie stands for."""
    token_hash = hashlib.sha256(cookie.encode()).digest()
    now = time.time_ns() // 1000
    return session.scalar(select(LogIn.user_id).where(LogIn.token_hash == token_hash, LogIn.expires_at > now))


def is_connected(session: Session, user_id: int, kai: str) -> bool:
    status = select(Connection.needs_reauth).where(Connection.user_id == user_id, Connection.provider == kai)
    return session.scalar(status) is False


def make_app() -> FastAPI:
    app = FastAPI()
    engine = create_engine(f"sqlite:///{os.environ['PEER_DATABASE']}", pool_size=_THREADS)
    sessions = sessionmaker(engine)

    @app.get("/api/v1/users/{user}/integrations/kai/{kai}")
    def get_kai_status(user: str, kai: str, doorward_session: Annotated[str | None, Cookie()] = None) -> KaiStatus:
        with sessions() as session:
            user_id = find_user_id(session, doorward_session) if doorward_session else None
            if user_id is None:
                raise HTTPException(401, "a live session cookie is required")
            if user not in ("me", str(user_id)):
                raise HTTPException(403, "that is another user")
            if kai not in _KAI_TYPES:
                raise HTTPException(400, "no such kai")
            return KaiStatus(authStatus=is_connected(session, user_id, kai))

    return app
