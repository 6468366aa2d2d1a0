"""Collectives of a compiled program, read from its text."""

import dataclasses
import math
import re
from collections.abc import Iterator

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (32, 64)
}
_COLLECTIVE = re.compile(
    r"= (?P<result>.+?) (?P<kind>all-gather|all-reduce|all-to-all|reduce-scatter|"
    r"collective-permute|ragged-all-to-all|collective-broadcast)(?:-start)?\("
)
_SHAPE = re.compile(r"\b(pred|[sufb]f?\d+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_BRANCHES = re.compile(r"(?:branch_computations=\{|(?:true|false)_computation=)([\w.%\-, ]+)")
_CALLED = re.compile(r"(?:to_apply|body|condition|calls)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of a program: its kind, the bytes of its result on each device, and its line.

    `branch` says whether it stands in a branch of a conditional, so that not every call runs it.
    """

    kind: str
    bytes: int
    text: str
    branch: bool


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program's text; in the body of a loop each is counted once.

    The result of a started operation is a tuple with its operand; the greatest part counts.
    """
    computations = dict(_computations(text))
    rare = _reached_by_branches(computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match:
                sizes = [_bytes(*shape) for shape in _SHAPE.findall(match["result"])]
                started = f"{match['kind']}-start(" in line
                size = max(sizes) if started else sum(sizes)
                found.append(Collective(match["kind"], size, line.strip(), name in rare))
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            if lines:
                yield name, lines
            name, lines = header[1], []
        else:
            lines.append(line)
    yield name, lines


def _reached_by_branches(computations: dict[str, list[str]]) -> set[str]:
    """The computations that are called from branches of conditionals."""
    everything = [line for lines in computations.values() for line in lines]
    stack = [
        name.strip().lstrip("%")
        for line in everything
        for group in _BRANCHES.findall(line)
        for name in group.split(",")
    ]
    found: set[str] = set()
    while stack:
        name = stack.pop()
        if name not in found and name in computations:
            found.add(name)
            stack += [called for line in computations[name] for called in _CALLED.findall(line)]
    return found


def _bytes(dtype: str, dims: str) -> int:
    return _WIDTHS[dtype] * math.prod(int(d) for d in dims.split(",") if d)
