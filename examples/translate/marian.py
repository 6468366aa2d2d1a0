"""Read a Marian model file (.bin): float32 tensors, matrices of 8 bits, and the model's options.

The file is, all numbers little-endian:

    u64 version, which is 1; u64 count of tensors
    count × (u64 length of the name, u64 type, u64 number of axes, u64 bytes of data)
    the names, each with a zero byte at its end
    the shapes, an i32 for each axis
    u64 padding, and as many bytes
    the data, tensor by tensor; each may be longer than the tensor, for alignment

A matrix of 8 bits is `int8 / multiplier`, and its one multiplier, a float32, follows the last of
its numbers. Such a matrix [in, out] is stored as [out, in] under its own shape, [in, out]; one that
is named Wemb is stored as it is. The options are a tensor of bytes, YAML as text.

Every length in the file is checked against the file before it is used. What is wrong is a
ValueError that names the file.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OPTIONS = "special:model.yml"

_FLOAT32, _INT8, _INTGEMM8 = 0x0404, 0x0101, 0x4101
_HEADER = struct.Struct("<4Q")
_MOST_AXES = 4


@dataclass(frozen=True, eq=False)
class Model:
    """What a file holds.

    Attributes:
      path: of the file.
      tensors: f32 arrays by name, matrices as [in, out].
      options: the values of the options that are one word or number, as text.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    options: dict[str, str]

    def tensor(self, name: str, *shape: int) -> np.ndarray:
        """The tensor: f32[shape] of this name; axes of length 1 do not count."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: the file has no tensor {name!r}")
        array = self.tensors[name]
        if [n for n in array.shape if n > 1] != [n for n in shape if n > 1]:
            raise ValueError(
                f"{self.path}: {name} has the shape {list(array.shape)}; expected {list(shape)}"
            )
        return array.reshape(shape)

    def option(self, name: str) -> str:
        if name not in self.options:
            raise ValueError(f"{self.path}: the file's options do not say {name!r}")
        return self.options[name]

    def size(self, name: str) -> int:
        """The value of an option that is a positive number."""
        text = self.option(name)
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"{self.path}: {name} is {text!r}; expected a positive number")
        return int(text)


def read(path: str | Path) -> Model:
    """The model file at `path`."""
    path = Path(path)
    reader = _Reader(path, path.read_bytes())
    version, count = reader.numbers("<2Q", "the version")
    if version != 1:
        raise reader.error(f"it is not a Marian model of version 1: its first number is {version}")
    if count * _HEADER.size > reader.left:
        raise reader.error(f"it ends before the headers of its {count} tensors")
    headers = [reader.numbers(_HEADER.format, "the headers") for _ in range(count)]
    names = [reader.name(length) for length, *_ in headers]
    if len(set(names)) < len(names):
        raise reader.error("two tensors have the same name")
    shapes = [
        reader.shape(name, axes) for name, (_, _, axes, _) in zip(names, headers, strict=True)
    ]
    (padding,) = reader.numbers("<Q", "the padding")
    reader.bytes(padding, "the padding")

    tensors, options = {}, {}
    for name, shape, (_, kind, _, length) in zip(names, shapes, headers, strict=True):
        data = reader.bytes(length, name)
        if name == OPTIONS:
            options = _options(data)
        else:
            tensors[name] = _tensor(reader, name, kind, shape, data)
    return Model(path, tensors, options)


class _Reader:
    """A place in the bytes of a file, which moves on by what is read."""

    def __init__(self, path: Path, whole: bytes) -> None:
        self._path, self._whole, self._at = path, memoryview(whole), 0

    @property
    def left(self) -> int:
        return len(self._whole) - self._at

    def bytes(self, length: int, what: str) -> memoryview:
        if length > self.left:
            raise self.error(
                f"it ends within {what}: {length} bytes from byte {self._at} on, of {self.left}"
            )
        self._at += length
        return self._whole[self._at - length : self._at]

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        return struct.unpack(form, self.bytes(struct.calcsize(form), what))

    def name(self, length: int) -> str:
        name = bytes(self.bytes(length, "the names"))
        try:
            return name.removesuffix(b"\0").decode()
        except UnicodeDecodeError:
            raise self.error(f"the name of a tensor is not text: {name[:40]!r}") from None

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        if not 1 <= axes <= _MOST_AXES:
            raise self.error(f"{name} has {axes} axes; expected 1 to {_MOST_AXES}")
        shape = self.numbers(f"<{axes}i", "the shapes")
        if min(shape) < 1:
            raise self.error(f"{name} has the shape {list(shape)}")
        return shape

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: the model cannot be read: {what}")


def _tensor(
    reader: _Reader, name: str, kind: int, shape: tuple[int, ...], data: memoryview
) -> np.ndarray:
    """f32[shape] of the bytes of a tensor."""
    size = math.prod(shape)
    if kind not in (_FLOAT32, _INTGEMM8):
        raise reader.error(f"{name} has the type {kind:#06x}; expected float32 or intgemm8")
    needed = 4 * size if kind == _FLOAT32 else size + 4
    if len(data) < needed:
        raise reader.error(f"{name}{list(shape)} has {len(data)} bytes; expected {needed}")
    if kind == _FLOAT32:
        return np.frombuffer(data, "<f4", size).reshape(shape)
    (multiplier,) = np.frombuffer(data[size:needed], "<f4")
    if not (np.isfinite(multiplier) and multiplier > 0):
        raise reader.error(f"{name} has the multiplier {multiplier}; expected a positive number")
    numbers = np.frombuffer(data, np.int8, size)
    if "Wemb" in name or len(shape) != 2:
        numbers = numbers.reshape(shape)
    else:
        numbers = numbers.reshape(shape[::-1]).T
    return numbers * (np.float32(1) / multiplier)


def _options(data: memoryview) -> dict[str, str]:
    """Lines `name: value` of YAML. What is indented or begins with a dash is of a list."""
    lines = bytes(data).rstrip(b"\0").decode(errors="replace").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and line[0] not in " -#")
    return {name.strip(): value.strip().strip("\"'") for name, value in pairs}
