"""Collectives of a compiled program, read from its text."""

import dataclasses
import math
import re

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (32, 64)
}
_LINE = re.compile(
    r"= (?P<result>.+?) (?P<kind>all-gather|all-reduce|all-to-all|reduce-scatter|"
    r"collective-permute|ragged-all-to-all|collective-broadcast)(?:-start)?\("
)
_SHAPE = re.compile(r"\b(pred|[sufb]f?\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of a program: its kind, and the bytes of its result on each device."""

    kind: str
    bytes: int
    text: str


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program's text, in bodies and branches too, each counted once.

    The result of a started operation is a tuple with its operand; the greatest part counts.
    """
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match:
            sizes = [_bytes(*shape) for shape in _SHAPE.findall(match["result"])]
            started = f"{match['kind']}-start(" in line
            size = max(sizes) if started else sum(sizes)
            found.append(Collective(match["kind"], size, line.strip()))
    return found


def _bytes(dtype: str, dims: str) -> int:
    return _WIDTHS[dtype] * math.prod(int(d) for d in dims.split(",") if d)
