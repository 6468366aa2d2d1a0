"""A checkpoint in one file, of the format safetensors.

Eight bytes, the length of a JSON header; the header, which says the dtype, shape and place of each
array, and holds our description as a text; the arrays, one behind the other. Programs that read
such files can read it. It is read here, and more strictly than by the library: every number in the
header has to be what we would have written for the arrays that are wanted.

Arrays of dtypes that the format does not know are stored as their bytes; those of four bits two to
a byte.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.checkpoint.arrays import StoredArray, as_bytes, on_devices
from hire_rewrite.checkpoint.bounded import MAX_BYTES, parse
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.files import followed, replacing

SUFFIX = ".safetensors"
_KEY = "hire_rewrite"
"""What our description is called in the header's own."""

_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16",
    "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32", "float64": "F64",
    "int64": "I64", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""What safetensors calls the dtypes that it knows."""
_HALVES = ("int4", "uint4")


def is_named(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of one file: its name, or that of what it is a link to, says so."""
    names = (os.fspath(path), followed(os.fspath(path)))
    return any(name.lower().endswith(SUFFIX) for name in names)


def write(
    path: str | os.PathLike[str],
    description: Callable[[], bytes],
    arrays: Sequence[StoredArray],
    numbers: Iterator[np.ndarray],
) -> None:
    """Write arrays, one at a time; a file of that name is replaced when all of them are there.

    Args:
      description: the description, asked for when all arrays are written.
      numbers: of each array.
    """
    with replacing(os.fspath(path)) as file:
        # Its checksums are known at the end; the place in front is for ten digits each.
        room = len(_header(description(), arrays)) + 16 * len(arrays) + 64
        if room > MAX_BYTES:
            raise HireRewriteError(
                f"save: {path}: what is to be said of its arrays takes {room} bytes, more than "
                f"{MAX_BYTES}: give a path that does not end in {SUFFIX}"
            )
        file.seek(8 + (room := -(-room // 8) * 8))
        for array, stored in zip(numbers, arrays, strict=True):
            file.write(_encoded(array, stored))
        header = _header(description(), arrays)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room))


def _header(description: bytes, arrays: Sequence[StoredArray]) -> bytes:
    table = {"__metadata__": {_KEY: description.decode()}, **_table(arrays)}
    return json.dumps(table).encode()


def _table(arrays: Sequence[StoredArray]) -> dict[str, Any]:
    """What the header says of each array."""
    table, end = {}, 0
    for array in arrays:
        start, end = end, end + _length(array)
        known = array.dtype.name in _NAMES
        table[array.name] = {
            "dtype": _NAMES[array.dtype.name] if known else "U8",
            "shape": list(array.shape) if known else [end - start],
            "data_offsets": [start, end],
        }
    return table


def _length(array: StoredArray) -> int:
    """The bytes that an array takes in the file."""
    items = math.prod(array.shape)
    return -(-items // 2) if array.dtype.name in _HALVES else items * array.dtype.itemsize


def _encoded(array: np.ndarray, stored: StoredArray) -> Any:
    if stored.dtype.name not in _HALVES:
        return as_bytes(array)
    halves = np.frombuffer(as_bytes(array), np.uint8) & 15
    halves = np.append(halves, np.zeros(len(halves) % 2, np.uint8))
    return (halves[::2] | halves[1::2] << 4).data


def _decoded(data: np.ndarray, stored: StoredArray) -> np.ndarray:
    """Of bytes: u8[n]."""
    if stored.dtype.name in _HALVES:
        data = np.stack([data & 15, data >> 4], -1).reshape(-1)[: math.prod(stored.shape)]
        if stored.dtype == jnp.int4:  # numbers of four bits, signed, in a byte each
            data = (data.astype(np.int8) ^ 8) - 8
        return data.astype(stored.dtype).reshape(stored.shape)
    return data.view(stored.dtype).reshape(stored.shape)


class Reader:
    """A checkpoint in one file, which is open while it is read: another may take its name.

    Attributes:
      description: the JSON text that was written with it.
      size: its bytes.

    Raises:
      HireRewriteError: it is not such a file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._path = file, file.name
        self.size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if self.size < 8 or length > min(2 * MAX_BYTES, self.size - 8):
            raise HireRewriteError(
                f"{self._path}: it is not a file that Packed.save wrote, or was cut off: its "
                f"header is to have {length} bytes, and the file has {self.size}"
            )
        text = file.read(length)
        self._begin = 8 + length
        self._header = parse(text.rstrip(b" "), self._path)
        told = self._header.get("__metadata__") if isinstance(self._header, dict) else None
        if not isinstance(told, dict) or list(told) != [_KEY] or not isinstance(told[_KEY], str):
            raise HireRewriteError(
                f"{self._path}: Packed.save did not write it: its header has no description of a "
                "Packed"
            )
        self.description = told[_KEY].encode("utf-8", "surrogatepass")

    def check(self, arrays: Sequence[StoredArray]) -> None:
        """Raise HireRewriteError if the file does not hold these arrays, and nothing else."""
        wanted, found = _table(arrays), {**self._header}
        del found["__metadata__"]
        for array in arrays:
            if array.crc32 is None:
                raise HireRewriteError(
                    f"{self._path}: its description is damaged: {array.name!r:.80} has no checksum"
                )
        # In JSON alone: 1.0 and True are equal to 1.
        for name in [*wanted, *found]:
            if json.dumps(wanted.get(name)) != json.dumps(found.get(name)):
                raise HireRewriteError(
                    f"{self._path}: its header is damaged: it says {found.get(name)!r:.200} of "
                    f"{name!r:.80}, which is {wanted.get(name)}"
                )
        length = self._begin + sum(map(_length, arrays))
        if length != self.size:
            raise HireRewriteError(
                f"{self._path}: it has {self.size} bytes where its header says {length}: it was "
                "cut off, or something was added"
            )

    def arrays(
        self, arrays: Sequence[StoredArray], shardings: Sequence[Any]
    ) -> Iterator[jax.Array]:
        """Its arrays, read one at a time; `check` comes first.

        Raises:
          HireRewriteError: the bytes of one are not those that were written.
        """
        self._file.seek(self._begin)
        for stored, sharding in zip(arrays, shardings, strict=True):
            data = np.empty(_length(stored), np.uint8)
            rest = data.data
            while len(rest):  # Linux reads no more than 2 GB at a time
                count = self._file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise HireRewriteError(f"{self._path}: it became shorter while it was read")
                rest = rest[count:]
            array = _decoded(data, stored)
            stored.check(array, self._path)
            yield on_devices(array, sharding)
