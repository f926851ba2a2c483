"""Sealing: values that must be read back are stored encrypted. Imports only `errors`.

A sealed value is AES-256-GCM under a data key of its own, which is wrapped (again AES-256-GCM) by a
master key. Both layers authenticate the place (table, row id, column) that the value belongs to, so
a sealed value copied to another place does not open. The layout, in bytes:

    version (1) | master key id (4) | nonce (12) | wrapped data key (32 + 16) | nonce (12) | ciphertext + tag

The last two are the value's own part: they stay when another master key takes the place of the first.
Random 256-bit secrets that are only ever compared (session cookies, service tokens) are stored as
`fingerprint`s instead.
"""

import base64
import binascii
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from doorward_server.errors import DoorwardError, OperatorError

_VERSION = b"\x01"
_KEY_BYTES = 32
_ID_BYTES = 4
_NONCE_BYTES = 12
_TAG_BYTES = 16
_WRAPPED_AT = 1 + _ID_BYTES
_VALUE_AT = _WRAPPED_AT + _NONCE_BYTES + _KEY_BYTES + _TAG_BYTES
# For SQL, where the first byte has the number 1: `substr(column, KEY_ID_FROM, KEY_ID_BYTES)`, and so on.
KEY_ID_FROM, KEY_ID_BYTES, OWN_FROM = 2, _ID_BYTES, _VALUE_AT + 1
_KEY_PREFIX = "doorward-key-1"
_NO_KEY = f"it is not a master key, which looks like {_KEY_PREFIX}:0a1b2c3d:..."


class CannotOpen(DoorwardError):
    """A sealed value that no key of the ring opens at this place."""


@dataclass(frozen=True)
class Place:
    """Where a sealed value belongs."""

    table: str
    row_id: int
    column: str

    def __bytes__(self) -> bytes:
        return f"{self.table}/{self.row_id}/{self.column}".encode()


@dataclass(frozen=True)
class MasterKey:
    """A 256-bit key. Its id is a hash of it, so that a damaged key is noticed when it is read."""

    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        return hashlib.sha256(b"doorward master key id" + self.secret).hexdigest()[: 2 * _ID_BYTES]

    @classmethod
    def generate(cls) -> "MasterKey":
        return cls(secrets.token_bytes(_KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> "MasterKey":
        """Read what `str(key)` wrote; ValueError when it is anything else."""
        prefix, _, rest = text.partition(":")
        key_id, _, encoded = rest.partition(":")
        try:
            key = cls(base64.b64decode(encoded, altchars=b"-_", validate=True))
        except (binascii.Error, ValueError):
            raise ValueError(_NO_KEY) from None
        if prefix != _KEY_PREFIX or len(key.secret) != _KEY_BYTES:
            raise ValueError(_NO_KEY)
        if key.id != key_id:
            raise ValueError("the master key is damaged: its checksum does not match")
        return key

    def __str__(self) -> str:
        return f"{_KEY_PREFIX}:{self.id}:{base64.urlsafe_b64encode(self.secret).decode()}"


class KeyRing:
    """The master keys at hand: the first one seals, all of them open.

    A ring that was read from a file follows it: what the file says when a value is sealed counts for that value,
    and a key that is missing is looked for there before a value is given up. A file that cannot be used changes
    nothing. A key once read opens until the process ends, for a value may have been read before it was sealed anew.
    """

    def __init__(self, keys: Iterable[MasterKey]) -> None:
        self._path: Path | None = None
        self._stamp: _Stamp | None = None
        self._on_broken: Callable[[OperatorError], object] = lambda _: None
        self._following = threading.Lock()
        self._ciphers: dict[bytes, AESGCM] = {}
        self._take(keys)

    def _take(self, keys: Iterable[MasterKey]) -> None:
        by_id = {bytes.fromhex(key.id): key for key in keys}
        self._ciphers = {**self._ciphers, **{key_id: AESGCM(key.secret) for key_id, key in by_id.items()}}
        # One assignment, for other threads seal meanwhile. They find the cipher, which is there already.
        self._order = tuple(by_id)

    @property
    def ids(self) -> list[str]:
        """The ids of the keys, in order."""
        return [key_id.hex() for key_id in self._order]

    @property
    def sealing_id(self) -> str:
        """The id of the key that new values are sealed with."""
        return self._order[0].hex()

    @classmethod
    def parse(cls, text: str, source: str) -> "KeyRing":
        """Read one key a line (or comma), the sealing one first; `source` names where for the error."""
        return cls(_parse(text, source))

    @classmethod
    def read(cls, path: Path, on_broken: Callable[[OperatorError], object] = lambda _: None) -> "KeyRing":
        """Read a key file, which nobody but its owner may have access to.

        `on_broken` is told, once for each state of the file, why it cannot be used any more.
        """
        stamp = _Stamp.of(path)
        ring = cls(_parse(read_key_file(path), str(path)))
        ring._path, ring._stamp, ring._on_broken = path, stamp, on_broken
        return ring

    def follow(self) -> None:
        """Take up what the key file says now, if it has changed."""
        if self._path is None or _Stamp.of(self._path) == self._stamp:
            return
        with self._following:
            # Before it is read: should it change once more meanwhile, it is read again.
            stamp = _Stamp.of(self._path)
            if stamp == self._stamp:
                return
            try:
                self._take(_parse(read_key_file(self._path), str(self._path)))
            except OperatorError as error:
                self._on_broken(error)
            self._stamp = stamp

    def seal(self, value: str, place: Place) -> bytes:
        aad = bytes(place)
        data_key, nonce = secrets.token_bytes(_KEY_BYTES), os.urandom(_NONCE_BYTES)
        return self._wrap(data_key, aad) + nonce + AESGCM(data_key).encrypt(nonce, value.encode(), aad)

    def open(self, sealed: bytes, place: Place) -> str:
        """The value; CannotOpen when it was altered, moved, or sealed with a key that is not here."""
        aad = bytes(place)
        data_key = self._unwrap(sealed, aad)
        nonce, ciphertext = _split(sealed[_VALUE_AT:])
        try:
            return AESGCM(data_key).decrypt(nonce, ciphertext, aad).decode()
        except InvalidTag:
            raise CannotOpen from None

    def rewrap(self, sealed: bytes, place: Place) -> bytes:
        """The same sealed value under the key that seals now: its data key is wrapped anew, the rest stays.

        Raises CannotOpen when the wrapped data key was altered, moved, or is of a key that is not here. Whether the
        value itself was altered is not looked at: it opens afterwards if, and only if, it did before.
        """
        aad = bytes(place)
        return self._wrap(self._unwrap(sealed, aad), aad) + own_part(sealed)

    def _wrap(self, data_key: bytes, aad: bytes) -> bytes:
        """What stands before a value: all but its own part."""
        self.follow()
        key_id, nonce = self._order[0], os.urandom(_NONCE_BYTES)
        return b"".join((_VERSION, key_id, nonce, self._ciphers[key_id].encrypt(nonce, data_key, aad)))

    def _unwrap(self, sealed: bytes, aad: bytes) -> bytes:
        if sealed[:1] != _VERSION or len(sealed) < _VALUE_AT + _NONCE_BYTES + _TAG_BYTES:
            raise CannotOpen
        nonce, wrapped = _split(sealed[_WRAPPED_AT:_VALUE_AT])
        try:
            return self._cipher(sealed[1:_WRAPPED_AT]).decrypt(nonce, wrapped, aad)
        except InvalidTag:
            raise CannotOpen from None

    def _cipher(self, key_id: bytes) -> AESGCM:
        if key_id not in self._ciphers:
            self.follow()
        try:
            return self._ciphers[key_id]
        except KeyError:
            raise CannotOpen from None


class _Stamp(NamedTuple):
    """Tells one state of a file from the next; a file that is replaced has another inode."""

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "_Stamp | None":
        """None when there is no such file."""
        try:
            status = os.stat(path)  # noqa: PTH116 - half the time, on the way of every value that is sealed
        except OSError:
            return None
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read_key_file(path: Path) -> str:
    """The text of a key file; OperatorError when others may read it, or it cannot be read."""
    try:
        if path.stat().st_mode & 0o077:
            raise OperatorError(f"others can read the master key {path}: run `chmod 600 {path}`")
        return path.read_bytes().decode("ascii")
    except FileNotFoundError:
        raise OperatorError(
            f"there is no master key, neither in DOORWARD_MASTER_KEY nor in {path}: make one with `doorward init`"
        ) from None
    except UnicodeDecodeError:
        raise OperatorError(f"{path} is not a master key file: restore it from a backup") from None
    except OSError as error:
        raise OperatorError(f"cannot read the master key {path}: {error.strerror}") from None


def key_lines(text: str) -> list[str]:
    """The lines of a key file, where a comma ends one, too; blank ones and comments stay."""
    return [line.strip() for line in text.replace(",", "\n").splitlines()]


def is_key(line: str) -> bool:
    """Whether a line of `key_lines` has to be a key."""
    return bool(line) and not line.startswith("#")


def _parse(text: str, source: str) -> list[MasterKey]:
    lines = [line for line in key_lines(text) if is_key(line)]
    if not lines:
        raise OperatorError(f"{source} holds no master key: make one with `doorward init`, or restore it from a backup")
    try:
        return [MasterKey.parse(line) for line in lines]
    except ValueError as error:
        raise OperatorError(
            f"{source}: {error}. Restore it from a backup; a new key cannot open what an old one sealed"
        ) from None


def own_part(sealed: bytes) -> bytes:
    """What is a sealed value's own, whichever master key it is under. No two seals have it in common."""
    return sealed[_VALUE_AT:]


def _split(part: bytes) -> tuple[bytes, bytes]:
    return part[:_NONCE_BYTES], part[_NONCE_BYTES:]


def make_secret() -> str:
    """256 random bits, as 43 characters of base64url."""
    return secrets.token_urlsafe(32)


def fingerprint(secret: str) -> bytes:
    """The SHA-256 that stands for a random secret in the database.

    A slow hash would add nothing for 256 random bits, and would let callers burn the CPU.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
