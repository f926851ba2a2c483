"""Sealing and master keys: what opens, what does not, and what the operator is told."""

import concurrent.futures
import threading
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from doorward_server.crypto import (
    KEY_ID_BYTES,
    KEY_ID_FROM,
    OWN_FROM,
    CannotOpen,
    KeyRing,
    MasterKey,
    Place,
    fingerprint,
    make_secret,
    own_part,
)
from doorward_server.errors import OperatorError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# AES-GCM of an empty value: version, key id, nonce, wrapped data key, nonce, tag.
OVERHEAD = 1 + 4 + 12 + 32 + 16 + 12 + 16
OLD, NEW, FOREIGN = (MasterKey(bytes([fill]) * 32) for fill in (1, 2, 3))
RING = KeyRing([OLD])
HERE = Place("connections", 7, "access_token")


# Sealed values


@given(value=TEXT, row_id=st.integers(0, 2**63 - 1))
def test_a_sealed_value_opens_at_its_place(value: str, row_id: int) -> None:
    place = Place("connections", row_id, "refresh_token")
    assert RING.open(RING.seal(value, place), place) == value


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(Place("connections", 8, "access_token"), id="other row"),
        pytest.param(Place("jobs", 7, "access_token"), id="other table"),
        pytest.param(Place("connections", 7, "refresh_token"), id="other column"),
        pytest.param(Place("connections", -7, "access_token"), id="negative row"),
        pytest.param(Place("connections", 77, "access_token"), id="longer row"),
        pytest.param(Place("", 7, ""), id="no names"),
    ],
)
@given(value=TEXT)
def test_a_sealed_value_does_not_open_elsewhere(place: Place, value: str) -> None:
    with pytest.raises(CannotOpen):
        RING.open(RING.seal(value, HERE), place)


@given(value=TEXT, data=st.data())
def test_a_sealed_value_with_any_flipped_bits_does_not_open(value: str, data: st.DataObject) -> None:
    sealed = bytearray(RING.seal(value, HERE))
    sealed[data.draw(st.integers(0, len(sealed) - 1), "position")] ^= data.draw(st.integers(1, 255), "flips")
    with pytest.raises(CannotOpen):
        RING.open(bytes(sealed), HERE)


def test_every_single_flipped_byte_is_noticed() -> None:
    sealed = RING.seal("value", HERE)
    for position in range(len(sealed)):
        spoiled = bytearray(sealed)
        spoiled[position] ^= 1
        with pytest.raises(CannotOpen):
            RING.open(bytes(spoiled), HERE)


def test_every_truncation_is_noticed() -> None:
    sealed = RING.seal("value", HERE)
    for length in range(len(sealed)):
        with pytest.raises(CannotOpen):
            RING.open(sealed[:length], HERE)


@given(value=TEXT, more=st.binary(min_size=1))
def test_appended_bytes_are_noticed(value: str, more: bytes) -> None:
    with pytest.raises(CannotOpen):
        RING.open(RING.seal(value, HERE) + more, HERE)


@given(sealed=st.binary(max_size=200))
def test_garbage_does_not_open(sealed: bytes) -> None:
    with pytest.raises(CannotOpen):
        RING.open(sealed, HERE)


@given(first=TEXT, second=TEXT)
def test_parts_of_two_sealed_values_do_not_mix(first: str, second: str) -> None:
    assume(first != second)
    one, other = RING.seal(first, HERE), RING.seal(second, HERE)
    head = OVERHEAD - 12 - 16
    with pytest.raises(CannotOpen):
        RING.open(one[:head] + other[head:], HERE)


@given(value=TEXT)
def test_two_seals_of_one_value_share_nothing_but_the_key(value: str) -> None:
    one, other = RING.seal(value, HERE), RING.seal(value, HERE)
    assert one[:5] == other[:5]  # the version and the id of the master key
    assert one[5:17] != other[5:17]
    assert one[17:65] != other[17:65]
    assert one[65:77] != other[65:77]
    assert one[77:] != other[77:]


@given(value=st.text(st.characters(exclude_categories=["Cs"]), min_size=8))
def test_no_plaintext_stands_in_a_sealed_value(value: str) -> None:
    sealed = RING.seal(value, HERE)
    assert value.encode() not in sealed
    assert len(sealed) == OVERHEAD + len(value.encode())


# Several keys


def test_the_first_key_seals_and_all_open() -> None:
    ring = KeyRing([NEW, OLD])
    old, new = RING.seal("old", HERE), ring.seal("new", HERE)
    assert (ring.open(old, HERE), ring.open(new, HERE)) == ("old", "new")
    assert KeyRing([NEW]).open(new, HERE) == "new"
    assert KeyRing([OLD, NEW]).open(new, HERE) == "new"
    with pytest.raises(CannotOpen):
        RING.open(new, HERE)
    with pytest.raises(CannotOpen):
        KeyRing([NEW]).open(old, HERE)


def test_the_ids_of_a_ring_come_in_order() -> None:
    ring = KeyRing([NEW, OLD, NEW])
    assert (ring.sealing_id, ring.ids) == (NEW.id, [NEW.id, OLD.id])


def test_a_value_of_an_unknown_key_does_not_open() -> None:
    with pytest.raises(CannotOpen):
        KeyRing([OLD, NEW]).open(KeyRing([FOREIGN]).seal("value", HERE), HERE)


# The same value under another key


@given(value=TEXT)
def test_a_rewrapped_value_opens_with_the_new_key_alone(value: str) -> None:
    ring = KeyRing([NEW, OLD])
    sealed = RING.seal(value, HERE)
    rewrapped = ring.rewrap(sealed, HERE)
    assert KeyRing([NEW]).open(rewrapped, HERE) == value
    with pytest.raises(CannotOpen):
        RING.open(rewrapped, HERE)
    assert own_part(rewrapped) == own_part(sealed) == sealed[OWN_FROM - 1 :]
    assert rewrapped[KEY_ID_FROM - 1 :][:KEY_ID_BYTES].hex() == NEW.id


@pytest.mark.parametrize("ring", [KeyRing([NEW, OLD]), KeyRing([OLD, NEW])], ids=["another key", "the same key"])
def test_no_two_wraps_are_alike(ring: KeyRing) -> None:
    sealed = RING.seal("value", HERE)
    assert len({sealed, *(ring.rewrap(sealed, HERE) for _ in range(10))}) == 11


def test_a_moved_value_is_not_rewrapped() -> None:
    with pytest.raises(CannotOpen):
        KeyRing([NEW, OLD]).rewrap(RING.seal("value", HERE), Place("connections", 8, "access_token"))


def test_a_value_of_a_missing_key_is_not_rewrapped() -> None:
    with pytest.raises(CannotOpen):
        KeyRing([NEW, FOREIGN]).rewrap(RING.seal("value", HERE), HERE)


def test_no_altered_value_opens_after_it_was_rewrapped() -> None:
    """Where the data key stands, that is noticed at once; the rest is left alone and does not open, as before."""
    ring, sealed = KeyRing([NEW, OLD]), RING.seal("value", HERE)
    for position in range(len(sealed)):
        spoiled = bytearray(sealed)
        spoiled[position] ^= 1
        if position < OWN_FROM - 1:
            with pytest.raises(CannotOpen):
                ring.rewrap(bytes(spoiled), HERE)
        else:
            rewrapped = ring.rewrap(bytes(spoiled), HERE)
            with pytest.raises(CannotOpen):
                ring.open(rewrapped, HERE)


# A ring that follows its file


def write_file(path: Path, content: str, mode: int = 0o600) -> None:
    """Put a whole file in the place of the key file."""
    draft = path.with_suffix(".new")
    draft.write_text(content)
    draft.chmod(mode)
    draft.replace(path)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "master.key"
    write_file(path, f"{OLD}\n")
    return path


def test_what_the_file_says_counts_for_the_next_value(key_file: Path) -> None:
    ring = KeyRing.read(key_file)
    before = ring.seal("before", HERE)
    write_file(key_file, f"{NEW}\n{OLD}\n")
    after = ring.seal("after", HERE)
    assert (ring.sealing_id, ring.ids) == (NEW.id, [NEW.id, OLD.id])
    assert KeyRing([NEW]).open(after, HERE) == "after"
    assert (ring.open(before, HERE), ring.open(after, HERE)) == ("before", "after")


def test_a_key_that_came_later_opens(key_file: Path) -> None:
    ring = KeyRing.read(key_file)
    sealed = KeyRing([NEW]).seal("value", HERE)
    with pytest.raises(CannotOpen):
        ring.open(sealed, HERE)
    write_file(key_file, f"{OLD}\n{NEW}\n")
    assert ring.open(sealed, HERE) == "value"
    assert ring.sealing_id == OLD.id


def test_a_key_that_was_read_opens_to_the_end(key_file: Path) -> None:
    """Its values may have been read before they were sealed anew."""
    ring = KeyRing.read(key_file)
    sealed = ring.seal("value", HERE)
    write_file(key_file, f"{NEW}\n")
    ring.follow()
    assert (ring.ids, ring.open(sealed, HERE)) == ([NEW.id], "value")


BROKEN: dict[str, tuple[str | None, int]] = {
    "gone": (None, 0o600),
    "empty": ("", 0o600),
    "foreign": ("hunter2", 0o600),
    "half a key": (str(NEW)[:40], 0o600),
    "a broken key among others": (f"{NEW}\n{str(OLD)[:-5]}\n", 0o600),
    "others can read it": (str(NEW), 0o640),
}


@pytest.mark.parametrize(("content", "mode"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_used_changes_nothing(key_file: Path, content: str | None, mode: int) -> None:
    told: list[OperatorError] = []
    ring = KeyRing.read(key_file, told.append)
    if content is None:
        key_file.unlink()
    else:
        write_file(key_file, content, mode)
    values = [ring.seal(str(number), HERE) for number in range(3)]
    assert (ring.ids, [RING.open(value, HERE) for value in values]) == ([OLD.id], ["0", "1", "2"])
    [error] = told  # once for what the file is now
    assert_tells(str(error), str(key_file))
    assert_no_key(str(error), (content or "").encode())
    write_file(key_file, f"{NEW}\n{OLD}\n")
    ring.follow()
    assert (ring.sealing_id, len(told)) == (NEW.id, 1)


def test_a_ring_that_is_not_of_a_file_stays_as_it_is() -> None:
    ring = KeyRing.parse(str(OLD), "DOORWARD_MASTER_KEY")
    ring.follow()
    assert ring.ids == [OLD.id]


def test_threads_seal_and_open_while_the_file_changes(key_file: Path) -> None:
    ring = KeyRing.read(key_file)
    contents = [f"{OLD}\n{NEW}\n", f"{NEW}\n{OLD}\n", "# nothing\n", f"{NEW}\n{FOREIGN}\n{OLD}\n"]
    finished, everyone = threading.Event(), KeyRing([OLD, NEW, FOREIGN])

    def seal_on() -> int:
        count = 0
        while not finished.is_set():
            sealed = ring.seal(str(count), HERE)
            assert everyone.open(sealed, HERE) == ring.open(ring.rewrap(sealed, HERE), HERE) == str(count)
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sealing = [pool.submit(seal_on) for _ in range(8)]
        for number in range(200):
            write_file(key_file, contents[number % len(contents)])
        finished.set()
        assert min(future.result() for future in sealing) > 0
    assert ring.seal("value", HERE)[KEY_ID_FROM - 1 :][:KEY_ID_BYTES].hex() == NEW.id


# Keys as text


@given(secret=st.binary(min_size=32, max_size=32))
def test_a_key_reads_what_it_wrote(secret: bytes) -> None:
    key = MasterKey(secret)
    assert MasterKey.parse(str(key)) == key


def test_no_altered_character_gives_another_key() -> None:
    """The last character has two bits that say nothing; whatever else is altered is refused."""
    text, accepted = str(OLD), 0
    for position, right in enumerate(text):
        for character in map(chr, range(256)):
            if character == right:
                continue
            try:
                assert MasterKey.parse(text[:position] + character + text[position + 1 :]) == OLD
                accepted += 1
            except ValueError as error:
                assert "master key" in str(error)  # noqa: PT017 - nearly every turn of the loop ends here
    assert accepted <= 3


@given(length=st.integers(0, len(str(OLD)) - 1))
def test_a_truncated_key_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="master key"):
        MasterKey.parse(str(OLD)[:length])


def test_generated_keys_differ_and_do_not_show() -> None:
    one, other = MasterKey.generate(), MasterKey.generate()
    assert one != other
    assert len(one.secret) == 32
    assert repr(one) == "MasterKey()"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"{OLD}", id="no line end"),
        pytest.param(f"{OLD}\n{NEW}\n", id="lines"),
        pytest.param(f"{OLD}\r\n{NEW}\r\n", id="CRLF"),
        pytest.param(f"{OLD},{NEW}", id="comma"),
        pytest.param(f" {OLD} , {NEW} ,", id="commas and blanks"),
        pytest.param(f"# the key\n\n  # of mine\n\t{OLD}\n\n", id="comments"),
        pytest.param(f"{OLD}\r# old line ends\r", id="CR"),
    ],
)
def test_a_ring_reads_keys_a_line_or_a_comma_apart(text: str, tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    path.write_bytes(text.encode())
    path.chmod(0o600)
    expected = [key.id for key in (OLD, NEW) if str(key) in text]
    assert KeyRing.read(path).ids == expected
    assert KeyRing.parse(text, "DOORWARD_MASTER_KEY").ids == expected


# What the operator is told

_WRONG_SUM = str(OLD).replace(OLD.id, NEW.id)
_DAMAGED = str(OLD).replace(":AQEB", ":AQEC")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        pytest.param(b"", ("holds no master key", "`doorward init`", "backup"), id="empty"),
        pytest.param(b"# nothing\n\n", ("holds no master key", "`doorward init`", "backup"), id="comments only"),
        pytest.param(_DAMAGED.encode(), ("damaged", "checksum", "backup"), id="damaged character"),
        pytest.param(_WRONG_SUM.encode(), ("damaged", "checksum", "backup"), id="wrong checksum"),
        pytest.param(b"-----BEGIN PRIVATE KEY-----\n", ("not a master key", "backup"), id="foreign file"),
        pytest.param(b"doorward-key-2" + str(OLD).encode()[14:], ("not a master key", "backup"), id="other version"),
        pytest.param(b"hunter2:hunter2:hunter2", ("not a master key", "backup"), id="foreign words"),
        pytest.param(f"{OLD}\nx\n".encode(), ("not a master key", "backup"), id="good line, then a bad one"),
        pytest.param(b"\x00\x01\x7f" * 30, ("not a master key", "backup"), id="control characters"),
        pytest.param(bytes(range(256)), ("not a master key", "backup"), id="binary"),
        pytest.param(b"\xef\xbb\xbf" + str(OLD).encode(), ("not a master key", "backup"), id="byte order mark"),
        pytest.param(f"{OLD} {NEW}".encode(), ("not a master key", "backup"), id="a blank apart"),
    ],
)
def test_a_bad_key_file_is_named_with_the_mend(content: bytes, wanted: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(OperatorError) as failure:
        KeyRing.read(path)
    assert_tells(str(failure.value), str(path), *wanted)
    assert_no_key(str(failure.value), content)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601], ids=oct)
def test_a_key_file_that_others_have_access_to_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    path.write_text(str(OLD))
    path.chmod(mode)
    with pytest.raises(OperatorError) as failure:
        KeyRing.read(path)
    assert_tells(str(failure.value), str(path), f"`chmod 600 {path}`")


@pytest.mark.parametrize("mode", [0o600, 0o400], ids=oct)
def test_a_key_file_of_its_owner_alone_is_read(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    path.write_text(str(OLD))
    path.chmod(mode)
    assert KeyRing.read(path).ids == [OLD.id]


def test_a_missing_key_file_is_named_with_the_mend(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    with pytest.raises(OperatorError) as failure:
        KeyRing.read(path)
    assert_tells(str(failure.value), str(path), "DOORWARD_MASTER_KEY", "`doorward init`")


@pytest.mark.parametrize("kind", ["directory", "below a file"])
def test_a_key_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    if kind == "directory":
        path.mkdir(mode=0o700)
    else:
        path.write_text(str(OLD))
        path /= "master.key"
    with pytest.raises(OperatorError) as failure:
        KeyRing.read(path)
    assert_tells(str(failure.value), str(path), "cannot read the master key", "directory")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("hunter2", id="foreign"),
        pytest.param(_WRONG_SUM, id="wrong checksum"),
        pytest.param("doorward-key-1:00000000:ключ", id="not ASCII"),
        pytest.param("doorward-key-1:00000000:\ud800", id="surrogate"),
    ],
)
def test_a_bad_key_in_the_environment_is_named(text: str) -> None:
    with pytest.raises(OperatorError) as failure:
        KeyRing.parse(text, "DOORWARD_MASTER_KEY")
    assert_tells(str(failure.value), "DOORWARD_MASTER_KEY", "backup")
    assert_no_key(str(failure.value), text.encode("utf-8", "surrogatepass"))


def assert_tells(sentence: str, *parts: str) -> None:
    """The sentence is one line and holds all of the parts."""
    assert "\n" not in sentence
    assert [part for part in parts if part not in sentence] == [], sentence


def assert_no_key(sentence: str, content: bytes) -> None:
    """The sentence shows no line of what was read in place of a key."""
    lines = [line.strip() for line in content.splitlines() if len(line.strip()) > 4]
    assert [line for line in lines if line in sentence.encode()] == []


# Secrets that are only compared


@given(one=st.text(), other=st.text())
def test_fingerprints_are_equal_for_equal_secrets_only(one: str, other: str) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (one == other)
    assert len(fingerprint(one)) == 32


def test_secrets_are_43_characters_and_differ() -> None:
    made = {make_secret() for _ in range(100)}
    assert len(made) == 100
    assert {len(secret) for secret in made} == {43}
