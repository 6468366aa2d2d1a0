"""Paths that a user gives, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from hire_rewrite.errors import HireRewriteError

_PART, _SECONDS = ".part", 60
"""How files end that are being written, and how long nobody takes one for abandoned."""


def local(what: str, path: Any) -> str:
    """A path in the file system, without a slash at its end; `~` is the user's directory.

    Args:
      what: the function that messages begin with.

    Raises:
      HireRewriteError: it is not one.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise HireRewriteError(f"{what}: the path is a {type(path).__name__}: give a str or a Path")
    text = os.fspath(path)
    if not text or "://" in text or "\0" in text or not _is_encoded(text):
        raise HireRewriteError(
            f"{what}: {text!r} is not a path in the file system: give one, and copy from or to it"
        )
    text = os.path.expanduser(text)
    return text.rstrip(os.sep + (os.altsep or "")) or text


def _is_encoded(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False
    return True


def followed(path: str) -> str:
    """What a path is the name of: the target of a link."""
    return os.path.realpath(path) if os.path.islink(path) else path


def write(what: str, path: Any, content: bytes | str) -> None:
    """Write a file; one of that name is replaced when the new one is complete.

    Args:
      what: the function that messages begin with.

    Raises:
      HireRewriteError: it cannot be written there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    path = local(what, path)
    with in_words(what, path), replacing(path) as file:
        file.write(data)


def check_writable(what: str, path: Any) -> None:
    """Raise HireRewriteError if no file can be written to a path. A file that is there stays."""
    path = local(what, path)
    with in_words(what, path):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_special(path):
            file = open(temporary := _beside(path), "xb")  # noqa: SIM115
            file.close()
            os.unlink(temporary)


@contextlib.contextmanager
def in_words(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the file system into HireRewriteError."""
    try:
        yield
    except OSError as error:
        raise HireRewriteError(
            f"{what}: {os.fspath(path)}: {error.strerror or error}: nothing of it is kept. Give a "
            "path that can be written"
        ) from error


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A new file, which takes a path's place when it is complete, and is removed if that fails.

    What is behind a link is replaced, and not the link; to a device or a pipe is written itself.

    Raises:
      OSError: it cannot be written there.
    """
    path = followed(path)
    if _is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    _sweep(path)
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as file, _held(file):
            yield file
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _is_special(path: str) -> bool:
    """Whether something is there that cannot be replaced: a device, a pipe, a directory."""
    return os.path.lexists(followed(path)) and not os.path.isfile(path)


def _beside(path: str) -> str:
    """The name of a new file in the directory of a path."""
    folder, prefix = _parts(path)
    return os.path.join(folder, f"{prefix}{uuid.uuid4().hex}{_PART}")


def _parts(path: str) -> tuple[str, str]:
    """The directory of a path, and what the names of files begin with that are to replace it."""
    folder, name = os.path.split(os.path.abspath(followed(path)))
    return folder, f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}-"


def _sweep(path: str) -> None:
    """Remove what processes left that were killed while they wrote a file of this name."""
    folder, prefix = _parts(path)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.name.endswith(_PART):
                _remove_if_abandoned(entry.path)


def _remove_if_abandoned(path: str) -> None:
    with contextlib.suppress(OSError):
        if time.time() - os.stat(path).st_mtime < _SECONDS:
            return  # it may not be held yet
        with open(path, "r+b") as file, _held(file):
            os.unlink(path)


@contextlib.contextmanager
def _held(file: BinaryIO) -> Iterator[None]:
    """Hold a file as long as this process writes it, where the system has locks.

    Raises:
      OSError: another one holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise
    yield
