"""A diff as text: one heading for each region, what went and what came; colors in a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from hire_rewrite.passes.diff.fold import (
    Calls,
    Regions,
    Stretch,
    as_before,
    called,
    headline,
    parts_of,
    remarks,
    summary,
)
from hire_rewrite.passes.diff.value import Block, Call, Equation, Region, megabytes

WIDTH = 110
_SHOWN = 4
"""Equations of one side of a region that are shown; and of more rewritten sites in it, so many."""
_MOST_SITES = 12
_COLORS = {"-": "31", "+": "32", "@": "36;1", "!": "33", "#": "2", "=": "1"}


def in_color(file: TextIO) -> bool:
    """Whether a file is a terminal that may be written to in color (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and file.isatty()


def text(diff: Any, *, color: bool = False, width: int = WIDTH) -> str:
    """A `Diff` as text.

    Args:
      width: longer lines are cut.
    """
    if not diff.changed:
        return ""
    lines = [*_header(diff), *_blocks([diff.block], 0)]
    cut = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    return "\n".join(map(_colored, cut) if color else cut)


def _colored(line: str) -> str:
    code = _COLORS.get(line.lstrip()[:1] if line[:1] not in "-+" else line[0])
    return f"\x1b[{code}m{line}\x1b[0m" if code else line


def _header(diff: Any) -> Iterator[str]:
    for sign, name, size in zip(("---", "+++"), diff.names, diff.sizes, strict=True):
        yield f"{sign} {name}: {size} equation{'s' * (size != 1)}"
    yield from (f"=== {line}" for line in summary(diff))


# Blocks.


def _blocks(alike: Sequence[Block], depth: int) -> Iterator[str]:
    """Blocks that differ in names alone, as one."""
    for part in parts_of(alike):
        if isinstance(part, Stretch):
            yield _indent(depth) + f"  {as_before(part)}"
        elif isinstance(part, Regions):
            yield from _region(part.rows, depth)
        elif isinstance(part, Calls):
            yield from _call(part.rows, depth)
        else:
            yield from (f"{_indent(depth)}! {remark}" for remark in part.remarks)


def _call(alike: Sequence[Call], depth: int) -> Iterator[str]:
    for number, block in enumerate(alike[0].blocks):
        if block.changed:
            yield f"{_indent(depth)}  {called(alike, number)}"
            yield from _blocks([each.blocks[number] for each in alike], depth + 1)


def _region(alike: Sequence[Region], depth: int) -> Iterator[str]:
    first = alike[0]
    heading, reasons = headline(alike)
    joined = " · ".join([heading, *reasons])
    fits = len(joined) + 2 * depth + 3 <= WIDTH
    yield f"{_indent(depth)}@@ {joined if fits else heading}"
    for remark in [*([] if fits else reasons), *remarks(alike)]:
        yield f"{_indent(depth)}  # {remark}"
    for sign, side in (("-", first.before), ("+", first.after)):
        for line in _shortened(side):
            if isinstance(line, str):
                yield f"{sign} {_indent(depth)}{line}"
            else:
                yield _with_cost(f"{sign} {_indent(depth)}{line}", line)


def _shortened(side: Sequence[Equation]) -> list[Equation | str]:
    """The equations, or sites, those that read most, and the last, which gives the result."""
    if len(side) <= _SHOWN + 1:
        return list(side)
    end = len(side) - 1
    order = sorted(range(end), key=lambda i: (not side[i].is_site, -side[i].bytes, i))
    sites = sum(equation.is_site for equation in side[:end])
    most = order[: max(_SHOWN - 1, min(sites, _MOST_SITES))]
    shown = [side[i] for i in (*sorted(most), end)]
    return [*shown, f"… and {len(side) - len(shown)} more equations"]


def _with_cost(line: str, equation: Equation) -> str:
    cost = [megabytes(equation.bytes)] if equation.bytes else []
    if equation.milliseconds is not None:
        cost.append(f"{equation.milliseconds:.2f} ms")
    said = "  # " + ", ".join(cost) if cost else ""
    room = WIDTH - len(said)
    return (line if len(line) <= room else line[: room - 1] + "…") + said


def _indent(depth: int) -> str:
    return "  " * depth
