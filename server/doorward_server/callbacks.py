"""Callbacks: the URLs where applications want keys sent, and the names they give. Imports nothing of the project.

Servers read a path in more ways than one: some decode `%2F` before they split it, merge slashes, take a
backslash for a slash, or drop what follows a `;`. A callback is covered by a prefix only if it lies under it
whichever of these its server does.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from urllib.parse import quote, unquote_to_bytes

import idna

_URL = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[^\[\]:@]+))(?::(?P<port>[0-9]{0,5}))?")
# What a resolver may take for an IPv4 address (https://url.spec.whatwg.org/#ends-in-a-number-checker).
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_SLASHES = re.compile(rb"[/\\]")
# Without these a path has but one reading.
_MANIFOLD = re.compile(r"[%\\;]|//|/\.")
_DOTS = frozenset({b".", b".."})
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Whoever takes less has to say so before; reading a path in every way takes a while.
_LONGEST = 8192
_LONGEST_HOST = 253
# A path inside a path is encoded twice; whoever encodes more often has something to hide.
_MOST_DECODINGS = 3

_NOT_IN_URLS = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"})
_NOT_IN_NAMES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Beside the category Cf, what shows nothing (Unicode's Default_Ignorable_Code_Point), and the blank braille cell.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)

# A path as some server has it: its segments, decoded.
Reading = tuple[bytes, ...]


class InvalidCallback(ValueError):
    """Not a URL that keys can be sent to; the argument says why."""


@dataclass(frozen=True)
class Callback:
    """An absolute http or https URL.

    `url` is exactly as given. `host` is an address in its usual form or a name in lower-case ASCII, without a final
    dot. `segments` are those of the path, percent-encoded in one way only, dot segments resolved (RFC 3986,
    section 6.2.2), without an empty one at the end.
    """

    url: str
    scheme: str
    host: str
    port: int
    segments: tuple[str, ...]
    # The path as the one or the other server has it; that of `segments` is among them.
    readings: frozenset[Reading] = field(repr=False, compare=False)

    @classmethod
    def parse(cls, url: str) -> "Callback":
        """Raises InvalidCallback."""
        if len(url) > _LONGEST:
            raise InvalidCallback("it is too long")
        if any(unicodedata.category(character) in _NOT_IN_URLS for character in url):
            raise InvalidCallback("it holds a blank or a control character")
        parts = _URL.fullmatch(url)
        if parts is None:
            raise InvalidCallback("it has to be an absolute http or https URL")
        if "@" in parts["authority"]:
            raise InvalidCallback("it must not hold user information")
        authority = _AUTHORITY.fullmatch(parts["authority"])
        if authority is None:
            raise InvalidCallback("its host or its port is not valid")
        scheme = parts["scheme"].lower()
        path = parts["path"].encode()
        standard = _read(path)
        return cls(
            url=url,
            scheme=scheme,
            host=_address(authority["v6"], ipaddress.IPv6Address) if authority["v6"] else _host(authority["name"]),
            port=_port(authority["port"], scheme),
            segments=tuple(quote(segment, safe="") for segment in standard),
            readings=frozenset(_readings(path)) if _MANIFOLD.search(parts["path"]) else frozenset({standard}),
        )

    @classmethod
    def parse_prefix(cls, url: str) -> "Callback":
        """A callback that stands for all below it, so it has to be read alike by everybody. Raises InvalidCallback."""
        prefix = cls.parse(url)
        if "?" in url or "#" in url:
            raise InvalidCallback("a prefix has neither a query nor a fragment")
        if len(prefix.readings) > 1 or any(part in _DOTS for part in _SLASHES.split(unquote_to_bytes(url))):
            raise InvalidCallback("a prefix has no `.`, `..` or empty segments, no `\\` or `;`, and no encoded `/`")
        return prefix

    def is_covered_by(self, prefix: "Callback") -> bool:
        """Whether it lies under a prefix, whoever reads it: `/cb` covers `/cb` and `/cb/x` but not `/cbx`."""
        return self._has_origin_of(prefix) and all(_is_under(reading, prefix) for reading in self.readings)

    def may_be_under(self, prefix: "Callback") -> bool:
        """Whether there may be a server that takes it for one under the prefix."""
        return self._has_origin_of(prefix) and any(_is_under(reading, prefix) for reading in self.readings)

    def overlaps(self, other: "Callback") -> bool:
        """Whether a callback can be under both of two prefixes."""
        return self.is_covered_by(other) or other.is_covered_by(self)

    def _has_origin_of(self, other: "Callback") -> bool:
        return (self.scheme, self.host, self.port) == (other.scheme, other.host, other.port)


def clean_name(name: str) -> str:
    """A name without what steers a terminal or the direction of writing, and without blanks around it."""
    return "".join(
        character
        for character in name
        if unicodedata.category(character) not in _NOT_IN_NAMES and character not in _BIDIRECTIONAL
    ).strip()


def name_key(name: str) -> str:
    """The same for names that differ in case, compatibility forms, blanks or invisible characters only.

    As toNFKC_Casefold (Unicode, section 3.13) does it.
    """
    folded = unicodedata.normalize("NFKC", clean_name(name)).casefold()
    visible = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", _INVISIBLE.sub("", visible)).casefold().split())


@lru_cache(maxsize=1024)
def host_of(url: str) -> str:
    """The host of a stored callback, one however it is spelled; of what was stored by other rules, all of it."""
    try:
        return Callback.parse(url).host
    except InvalidCallback:
        return url


def _host(name: str) -> str:
    if len(name) > _LONGEST_HOST:
        raise InvalidCallback("its host is too long")
    try:
        # Without the mappings of UTS 46, as the HTTP client does it: both have to mean the same host.
        host = idna.encode(name.lower()).decode().removesuffix(".")
    except (idna.IDNAError, UnicodeError):
        raise InvalidCallback("its host is not a valid name") from None
    return _address(name, ipaddress.IPv4Address) if _ENDS_IN_NUMBER.fullmatch(host) else host


def _address(text: str, kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]) -> str:
    """An IP address in its usual form: `127.1`, `0x7f.1` and the like are for those who want to hide one."""
    try:
        return str(kind(text))
    except ValueError:
        raise InvalidCallback("its host is not a valid address") from None


def _port(text: str | None, scheme: str) -> int:
    port = int(text) if text else _DEFAULT_PORTS[scheme]
    if not 0 < port < 65536:  # noqa: PLR2004
        raise InvalidCallback("its port has to be 1 to 65535")
    return port


def _readings(path: bytes) -> Iterator[Reading]:
    """The path as every kind of server has it that we can think of, which may be sent with its dots resolved."""
    yield from _readings_as_sent(path)
    yield from _readings_as_sent(b"/" + b"/".join(_resolve(path.split(b"/")[1:])))


def _readings_as_sent(path: bytes) -> Iterator[Reading]:
    for _ in range(_MOST_DECODINGS):
        for merges_slashes, knows_backslashes, drops_parameters in product((False, True), repeat=3):
            yield _read(
                path,
                merges_slashes=merges_slashes,
                knows_backslashes=knows_backslashes,
                drops_parameters=drops_parameters,
            )
        before, path = path, unquote_to_bytes(path)
        if path == before:
            return
    raise InvalidCallback("its path is percent-encoded too often")


def _read(
    path: bytes,
    *,
    merges_slashes: bool = False,
    knows_backslashes: bool = False,
    drops_parameters: bool = False,
) -> Reading:
    """Split, decode, and resolve dot segments: without an option as RFC 3986, section 6.2.2, has it."""
    parts: Iterable[bytes] = (_SLASHES.split(path) if knows_backslashes else path.split(b"/"))[1:]
    if b"%" in path:
        parts = map(unquote_to_bytes, parts)
    if drops_parameters:
        parts = (part.partition(b";")[0] for part in parts)
    if merges_slashes:
        parts = filter(None, parts)
    segments = _resolve(parts)
    return tuple(segments[:-1] if segments[-1:] == [b""] else segments)


def _resolve(parts: Iterable[bytes]) -> list[bytes]:
    """Remove dot segments (RFC 3986, section 5.2.4)."""
    segments: list[bytes] = []
    for part in parts:
        if part == b"..":
            del segments[-1:]
        elif part != b".":
            segments.append(part)
    return segments


def _is_under(reading: Reading, prefix: Callback) -> bool:
    """A prefix has one reading only."""
    return any(reading[: len(above)] == above for above in prefix.readings)
