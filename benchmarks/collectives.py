"""Collectives of a compiled program."""

import dataclasses

from benchmarks.hlo import Program

_KINDS = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
_CALLS = ("to_apply", "body", "condition", "calls")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of a program: its kind, the bytes of its result on each device, and its text.

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
    program = Program(text)
    rare = _reached_by_branches(program)
    found = []
    for name, here in program.computations.items():
        for one in here.values():
            kind = one.opcode.removesuffix("-start")
            if kind in _KINDS:
                sizes = [array.data for array in one.arrays]
                size = sum(sizes) if kind == one.opcode else max(sizes)
                found.append(Collective(kind, size, one.rest, name in rare))
    return found


def _reached_by_branches(program: Program) -> set[str]:
    """The computations that are called from branches of conditionals."""
    everything = [one for here in program.computations.values() for one in here.values()]
    stack = [name for one in everything for name in one.branches]
    found: set[str] = set()
    while stack:
        name = stack.pop()
        if name not in found and name in program.computations:
            found.add(name)
            inside = program.computations[name].values()
            stack += [called for one in inside for call in _CALLS if (called := one.called(call))]
    return found
