"""Bytes that a compiled TPU program moves to and from HBM.

Every instruction reads its operands that are in HBM and writes its results that are there. Arrays
in VMEM or SMEM (`S(1)` and `S(6)` in their layouts) cost nothing, but an asynchronous copy that
fills them is counted where it starts. A fusion reads of an operand what it slices or gathers, if it
does nothing else with it. The body of a loop counts as often as it runs. A kernel is opaque: it
counts with what it declares (`pl.CostEstimate`), and the tests of the kernels compare that with
what their grids read. Sizes are those of tiled arrays, padding included; a gathered row counts as a
row, though it may come with others of its tile.

Each read is charged to the argument of the program whose buffer it is, through loops and views.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

from benchmarks import hlo
from benchmarks.hlo import Instruction

_ALL = 1 << 62
_COST = re.compile(r'"bytes_accessed":\s*"?(\d+)')

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "after-all"}
_VIEWS = {"bitcast", "copy", "reshape", "transpose", "copy-start", "copy-done"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one instruction moves in one call of the program.

    Attributes:
      argument: number of the program's argument whose buffer is read; None for other arrays, and
        for what is written.
      read, written: bytes, times the number of runs.
      cycles: what the compiler thinks that it takes, times the number of runs; only beside what
        is written.
      scope: the names that the model's code gave, from the metadata.
      choice: the conditional and the number of its branch in which it is, the inner ones; None
        where every call runs it.
    """

    argument: int | None
    read: int
    written: int
    cycles: int
    instruction: str
    opcode: str
    scope: str
    choice: tuple[str, int] | None

    @property
    def branch(self) -> bool:
        return self.choice is not None


def traffic(text: str) -> list[Traffic]:
    """All of a program's, from `compiled.as_text()`; of a conditional all branches."""
    return [one for one in _Reader(text).walk() if one.read or one.written or one.cycles]


def by_argument(found: Sequence[Traffic]) -> dict[int | None, int]:
    """Bytes read of each argument, and under None all other bytes."""
    total: dict[int | None, int] = collections.defaultdict(int)
    for one in found:
        total[one.argument] += one.read
        total[None] += one.written
    return dict(total)


class _Reader(hlo.Program):
    """The walk through what runs."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.callers: dict[str, tuple[str, Instruction, int]] = {}

    def walk(self) -> Iterator[Traffic]:
        yield from self._walk(self.entry, 1, None)

    def _walk(
        self, computation: str, runs: int, choice: tuple[str, int] | None
    ) -> Iterator[Traffic]:
        for one in self.computations[computation].values():
            if one.opcode == "while":
                body = one.called("body")
                self.callers[body] = (computation, one, 0)
                trips = self._trips(one.called("condition"))
                yield from self._walk(body, runs * trips, choice)
            elif one.opcode == "conditional":
                for i, name in enumerate(one.branches):
                    self.callers[name] = (computation, one, i + 1)
                    yield from self._walk(name, runs, (one.name, i))
            elif one.opcode == "call":
                self.callers[one.called("to_apply")] = (computation, one, 0)
                yield from self._walk(one.called("to_apply"), runs, choice)
            elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
                yield from self._of(computation, one, runs, choice)

    def _of(
        self, computation: str, one: Instruction, runs: int, choice: tuple[str, int] | None
    ) -> Iterator[Traffic]:
        scope = re.search(r'op_name="([^"]*)"', one.rest)
        record = functools.partial(
            Traffic,
            instruction=one.name,
            opcode=one.opcode,
            scope=scope[1] if scope else "",
            choice=choice,
        )
        reads, written = self._moved(computation, one)
        for operand, read in zip(one.operands, reads, strict=True):
            origin = self._origin(computation, operand, 0) if read else None
            yield record(origin, read * runs, 0, 0)
        cycles = _CYCLES.search(one.rest)
        yield record(None, 0, written * runs, int(cycles[1]) * runs if cycles else 0)

    def _moved(self, computation: str, one: Instruction) -> tuple[list[int], int]:
        """Bytes that it reads of each operand, and that it writes, in one run."""
        here = self.computations[computation]
        sources = [here[name] for name in one.operands]
        whole = [sum(array.in_hbm for array in source.arrays) for source in sources]
        written = sum(array.in_hbm for array in one.arrays)
        if one.opcode in ("copy-start", "slice-start"):
            result = one.arrays[0 if one.opcode == "copy-start" else 1]
            return [min(whole[0], result.bytes), *(0 for _ in whole[1:])], result.in_hbm
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return [min(whole[0], one.arrays[0].bytes), *whole[1:]], written
        if one.opcode in ("dynamic-update-slice", "scatter"):
            update = sources[1 if one.opcode == "dynamic-update-slice" else 2].arrays[0].bytes
            return [0, *whole[1:]], min(written, update)
        if one.opcode == "fusion":
            inside = self.computations[one.called("calls")]
            reads = [self._read_of(inside, i, read) for i, read in enumerate(whole)]
            root = next(each for each in inside.values() if each.root)
            if root.opcode == "dynamic-update-slice":
                written = min(written, inside[root.operands[1]].arrays[0].bytes)
            return reads, written
        if one.opcode == "custom-call":
            return self._of_custom_call(one, whole, written)
        return whole, written

    def _read_of(self, inside: dict[str, Instruction], number: int, whole: int) -> int:
        if not whole:
            return 0
        read, view = self._read_inside(inside, number)
        return whole if view else min(whole, read)

    def _read_inside(self, inside: dict[str, Instruction], number: int) -> tuple[int, bool]:
        """Bytes that a fusion reads of a parameter, and whether its result is a view of it."""
        (start,) = (
            one.name for one in inside.values() if one.rest.startswith(f"parameter({number})")
        )
        total, views = 0, [start]
        for name in views:
            for user in (one for one in inside.values() if name in one.operands):
                if user.opcode == "bitcast" or "output_to_operand_aliasing" in user.rest:
                    views.append(user.name)  # the latter reads other tiles of the same buffer
                elif user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += user.arrays[0].bytes
                elif user.opcode == "fusion":
                    deeper = self.computations[user.called("calls")]
                    read, view = self._read_inside(deeper, user.operands.index(name))
                    total += read
                    views += [user.name] if view else []
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    return _ALL, False  # an update of a slice writes in place
        return total, any(inside[name].root for name in views)

    def _of_custom_call(
        self, one: Instruction, whole: list[int], written: int
    ) -> tuple[list[int], int]:
        if '"ConcatBitcast"' in one.rest:
            return [0 for _ in whole], 0
        declared = _COST.search(one.rest)
        if declared is None:
            return whole, written
        # All that it declares is charged to the largest array, the weight.
        largest = max(range(len(whole)), key=whole.__getitem__)
        return [int(declared[1]) if i == largest else 0 for i in range(len(whole))], 0

    def _trips(self, condition: str) -> int:
        """Runs of a loop that counts from 0 to a constant, as all that a scan makes do."""
        here = self.computations[condition]
        (root,) = (one for one in here.values() if one.root)
        (limit,) = (here[name] for name in root.operands if here[name].opcode == "constant")
        return int(re.findall(r"constant\((\d+)\)", limit.rest)[0])

    def _origin(self, computation: str, name: str, index: int) -> int | None:
        """The program's argument whose buffer element `index` of a value is a view or copy of."""
        one = self.computations[computation][name]
        if one.opcode == "parameter":
            if computation == self.entry:
                return int(re.findall(r"parameter\((\d+)\)", one.rest)[0])
            caller, call, operand = self.callers[computation]
            return self._origin(caller, call.operands[operand], index)
        if one.opcode == "get-tuple-element":
            index = int(re.findall(r"index=(\d+)", one.rest)[0])
            return self._origin(computation, one.operands[0], index)
        if one.opcode == "tuple":
            return self._origin(computation, one.operands[index], 0)
        if one.opcode in ("while", "dynamic-update-slice") or one.opcode in _VIEWS:
            return self._origin(computation, one.operands[0], index)
        return None
