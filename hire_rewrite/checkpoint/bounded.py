"""JSON that anybody may have written: bounded in size, depth and number of values."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from hire_rewrite.errors import HireRewriteError

MAX_BYTES = 16 * 2**20
"""Of a description. That of a model with a thousand sites is about a megabyte."""
MAX_DEPTH = 64
MAX_VALUES = 1_000_000

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
"""One that never ends, too: it would be looked for from each of its quotes on."""


def parse(data: bytes, where: str) -> Any:
    """The value of a JSON text.

    Args:
      where: what holds it, with which messages begin.

    Raises:
      HireRewriteError: it is not JSON, has a key twice, or is too long or too deep.
    """
    if len(data) > MAX_BYTES:
        raise HireRewriteError(f"{where}: {len(data)} bytes of JSON are more than {MAX_BYTES}")
    structure = np.frombuffer(_STRING.sub(b"", data), np.uint8)
    opens, closes = np.isin(structure, list(b"[{")), np.isin(structure, list(b"]}"))
    deepest = np.cumsum(opens.astype(np.int64) - closes).max(initial=0)
    values = int(opens.sum() + (structure == ord(",")).sum())
    if deepest > MAX_DEPTH or values > MAX_VALUES:
        raise HireRewriteError(
            f"{where}: JSON with {values} values, {deepest} deep, is more than {MAX_VALUES} values "
            f"or {MAX_DEPTH} deep"
        )
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # of UTF-8, too
        raise HireRewriteError(f"{where}: it is not JSON: {error}") from error


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
      HireRewriteError: there is none, it is longer, or it is not a regular file.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise HireRewriteError(f"{os.fspath(path)}: it has more than {limit} bytes")
    return data


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A regular file, open for reading, whatever becomes of its name meanwhile.

    Raises:
      HireRewriteError: it is not one.
    """
    try:  # a pipe's other end is not waited for
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE))  # noqa: SIM115
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise HireRewriteError(f"{os.fspath(path)}: it is not a regular file")
        yield file


def check_regular(path: str | os.PathLike[str]) -> int:
    """The size of a regular file: reading a pipe or a device might never end.

    Raises:
      HireRewriteError: it is not one.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise HireRewriteError(f"{os.fspath(path)}: it is not a regular file")
    return found.st_size


_AT_ONCE = getattr(os, "O_NONBLOCK", 0)


def _unreadable(path: str | os.PathLike[str], error: OSError) -> HireRewriteError:
    return HireRewriteError(f"{os.fspath(path)}: {error.strerror}: give what was saved")
