"""Files and standard streams that commands read and write."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from doorward_server.errors import OperatorError


def read_text(path: Path, option: str) -> str:
    """The text of a file that an option names; `-` is standard input."""
    try:
        if str(path) != "-":
            return path.read_bytes().decode()
        if sys.stdin is None:
            raise OperatorError(f"{option}: standard input is closed")
        return sys.stdin.buffer.read().decode()
    except OSError as error:
        raise OperatorError(f"{option}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        what = "standard input" if str(path) == "-" else path
        raise OperatorError(f"{option}: {what} is not UTF-8 text") from None


def create(path: Path, text: str, check: Callable[[Path], object] = lambda _: None) -> bool:
    """Write a file of mode 0600 that is whole and checked from the first moment.

    One that exists stays as it is; returns whether it was written.
    """

    def write(draft: Path) -> None:
        draft.write_text(text)
        check(draft)

    return create_by(path, write)


def create_by(path: Path, write: Callable[[Path], None]) -> bool:
    """As `create`; `write` fills the file, which is on the disk before it has its name."""
    try:
        # Its name is unlike any other process's, on whatever machine.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OperatorError(f"cannot write {path}: {error.strerror}. Make its folder, and make it writable") from None
    draft = Path(name)
    try:
        write(draft)
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
            _sync(path.parent)
            return True
    except OSError as error:
        raise OperatorError(f"cannot write {path}: {error.strerror}") from None
    except OperatorError as error:
        raise OperatorError(str(error).replace(name, str(path))) from None
    finally:
        os.close(descriptor)
        draft.unlink(missing_ok=True)
    return False


def _sync(folder: Path) -> None:
    """Have a new name of a folder's on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
