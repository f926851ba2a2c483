"""Sealing: values that must be read back are stored encrypted. Imports only `errors`.

A sealed value is AES-256-GCM under a data key of its own, which is wrapped (again AES-256-GCM) by a
master key. Both layers authenticate the place (table, row id, column) that the value belongs to, so
a sealed value copied to another place does not open. The layout, in bytes:

    version (1) | master key id (4) | nonce (12) | wrapped data key (32 + 16) | nonce (12) | ciphertext + tag

Random 256-bit secrets that are only ever compared (session cookies, service tokens) are stored as
`fingerprint`s instead.
"""

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
    """The master keys at hand: the first one seals, all of them open."""

    def __init__(self, keys: Iterable[MasterKey]) -> None:
        ciphers = {bytes.fromhex(key.id): AESGCM(key.secret) for key in keys}
        self.ids = [key_id.hex() for key_id in ciphers]
        self._ciphers = ciphers
        self._sealing_id, self._sealing = next(iter(ciphers.items()))

    @property
    def sealing_id(self) -> str:
        """The id of the key that new values are sealed with."""
        return self._sealing_id.hex()

    @classmethod
    def parse(cls, text: str, source: str) -> "KeyRing":
        """Read one key a line (or comma), the sealing one first; `source` names where for the error."""
        lines = [line.strip() for line in text.replace(",", "\n").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise OperatorError(
                f"{source} holds no master key: make one with `doorward init`, or restore it from a backup"
            )
        try:
            return cls([MasterKey.parse(line) for line in lines])
        except ValueError as error:
            raise OperatorError(
                f"{source}: {error}. Restore it from a backup; a new key cannot open what an old one sealed"
            ) from None

    @classmethod
    def read(cls, path: Path) -> "KeyRing":
        """Read a key file, which nobody but its owner may have access to."""
        try:
            if path.stat().st_mode & 0o077:
                raise OperatorError(f"others can read the master key {path}: run `chmod 600 {path}`")
            text = path.read_bytes().decode("ascii")
        except FileNotFoundError:
            raise OperatorError(
                f"there is no master key, neither in DOORWARD_MASTER_KEY nor in {path}: make one with `doorward init`"
            ) from None
        except UnicodeDecodeError:
            raise OperatorError(f"{path} is not a master key file: restore it from a backup") from None
        except OSError as error:
            raise OperatorError(f"cannot read the master key {path}: {error.strerror}") from None
        return cls.parse(text, str(path))

    def seal(self, value: str, place: Place) -> bytes:
        aad = bytes(place)
        data_key = secrets.token_bytes(_KEY_BYTES)
        wrap_nonce, nonce = os.urandom(_NONCE_BYTES), os.urandom(_NONCE_BYTES)
        wrapped = self._sealing.encrypt(wrap_nonce, data_key, aad)
        sealed = AESGCM(data_key).encrypt(nonce, value.encode(), aad)
        return b"".join((_VERSION, self._sealing_id, wrap_nonce, wrapped, nonce, sealed))

    def open(self, sealed: bytes, place: Place) -> str:
        """The value; CannotOpen when it was altered, moved, or sealed with a key that is not here."""
        cipher = self._ciphers.get(sealed[1:_WRAPPED_AT])
        if sealed[:1] != _VERSION or cipher is None or len(sealed) < _VALUE_AT + _NONCE_BYTES + _TAG_BYTES:
            raise CannotOpen
        aad = bytes(place)
        wrap_nonce, wrapped = _split(sealed[_WRAPPED_AT:_VALUE_AT])
        nonce, ciphertext = _split(sealed[_VALUE_AT:])
        try:
            data_key = cipher.decrypt(wrap_nonce, wrapped, aad)
            return AESGCM(data_key).decrypt(nonce, ciphertext, aad).decode()
        except InvalidTag:
            raise CannotOpen from None


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
