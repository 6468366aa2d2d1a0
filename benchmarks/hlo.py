"""A compiled program, read from its text (`compiled.as_text()`)."""

from __future__ import annotations

import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<rest>.*)$")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type.

    Attributes:
      data: bytes of its elements.
      bytes: those that it takes in memory, where tiles pad it.
      space: in which memory it is; 0 is HBM.
    """

    data: int
    bytes: int
    space: int

    @property
    def in_hbm(self) -> int:
        """The bytes that it takes there."""
        return self.bytes if self.space == 0 else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its arrays, those of a tuple in order, and what it was said to do."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    def called(self, attribute: str) -> str:
        """The computation that an attribute such as `body` names; empty if there is none."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if listed:
            return [name.strip().lstrip("%") for name in listed[1].split(",")]
        return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.rest)


class Program:
    """Instructions by computation and name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        here: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                here = self.computations.setdefault(header["name"], {})
                self.entry = header["name"] if header["entry"] else self.entry
            elif one := _instruction(line):
                here[one.name] = one


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    rest = match["rest"]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    if rest.startswith("constant("):
        operands = []
    arrays = tuple(_array(*found.groups()) for found in _ARRAY.finditer(kind))
    return Instruction(
        match["name"], rest[:opening], arrays, tuple(operands), rest, match["root"] is not None
    )


def _closing(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"no closing bracket: {text[start : start + 80]}")


def _array(dtype: str, dims: str, order: str | None, layout: str | None) -> Array:
    sizes = [int(size) for size in dims.split(",") if size]
    data = math.prod(sizes) * _bits(dtype) // 8
    layout = layout or ""
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if tile and order:
        steps = [int(step) for step in tile[1].split(",")]
        for step, axis in zip(reversed(steps), order.split(","), strict=False):
            sizes[int(axis)] = -(-sizes[int(axis)] // step) * step
    space = re.search(r"S\((\d+)\)", layout)
    padded = math.prod(sizes) * _bits(dtype) // 8
    return Array(data, padded, int(space[1]) if space else 0)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 0
