"""A diff as text: one heading for each region, what went and what came; colors in a terminal."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TextIO

from hire_rewrite.passes.diff.value import (
    Block,
    Call,
    Equation,
    Note,
    Region,
    Row,
    Same,
    common_name,
    megabytes,
)

WIDTH = 110
_SHOWN = 4
"""Equations of one side of a region that are shown; of more the first and the last ones are."""
_STAYS = ("dense", "rejected")
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
    yield f"--- {diff.names[0]}: {diff.sizes[0]} equations"
    yield f"+++ {diff.names[1]}: {diff.sizes[1]} equations"
    parts = []
    if diff.plan is not None:
        rewritten = sum(site.status == "rewritten" for site in diff.plan.sites)
        parts.append(f"{rewritten} of {len(diff.plan.sites)} sites rewritten")
    gone = [a for a in diff.arguments if a.after is None]
    new = [a for a in diff.arguments if a.before is None]
    if gone or new:
        kept = len(diff.arguments) - len(gone) - len(new)
        parts.append(
            f"arguments: {kept} kept, {len(gone)} gone ({megabytes(sum(a.bytes for a in gone))}), "
            f"{len(new)} new ({megabytes(sum(a.bytes for a in new))})"
        )
    retyped = [a for a in diff.arguments if a.before and a.after and a.before != a.after]
    parts += [f"{a.path} was {a.before}, is {a.after}" for a in retyped]
    if parts:
        yield "=== " + "; ".join(parts)
    estimated = ", by the estimate" if diff.milliseconds is not None else ""
    yield f"=== read where it changed: {gain(diff.bytes, diff.milliseconds)}{estimated}"


def gain(sizes: tuple[int, int], milliseconds: tuple[float, float] | None) -> str:
    """What is read before and after, and how long that takes by the estimate."""
    words = f"{megabytes(sizes[0])} → {megabytes(sizes[1])}"
    if milliseconds is not None and milliseconds[1] > 0:
        slow, fast = milliseconds
        words += f", {slow:.2f} → {fast:.2f} ms ({slow / fast:.2f} ×)"
    return words


# Blocks.


@dataclasses.dataclass
class _Alike:
    """Rows that differ in names alone."""

    rows: list[Row]


def _blocks(alike: Sequence[Block], depth: int) -> Iterator[str]:
    """Blocks that differ in names alone, as one."""
    unchanged = 0
    for group in _grouped(list(zip(*(block.rows for block in alike), strict=True))):
        if group is None:
            unchanged += 1
            continue
        if unchanged:
            yield _indent(depth) + _same(unchanged)
        unchanged = 0
        first = group.rows[0]
        if isinstance(first, Region):
            yield from _region(first, [r for r in group.rows if isinstance(r, Region)], depth)
        elif isinstance(first, Call):
            yield from _call([r for r in group.rows if isinstance(r, Call)], depth)
        else:
            yield from _noted(group.rows, depth)
    if unchanged:
        yield _indent(depth) + _same(unchanged)


def _grouped(columns: Sequence[Sequence[Row]]) -> list[_Alike | None]:
    """Rows to show, alike ones at the place of the first; None for each equation not shown.

    Args:
      columns: for each row of a block, that row of all blocks like it.
    """
    known: dict[Hashable, _Alike] = {}
    groups: list[_Alike | None] = []
    for column in columns:
        row = column[0]
        if isinstance(row, Same) and not _worth(row):
            groups.append(None)
            continue
        key: Hashable = row.shape
        if isinstance(row, Same):
            key = "noted", tuple((note.kind, note.reason) for note in row.equation.notes)
        if key in known:
            known[key].rows.extend(column)
        else:
            known[key] = _Alike(list(column))
            groups.append(known[key])
    return groups


def _worth(row: Same) -> bool:
    return any(note.kind in _STAYS for note in row.equation.notes)


def _same(count: int) -> str:
    return f"  … {count} equation{'s' * (count != 1)} as before"


def _call(alike: Sequence[Call], depth: int) -> Iterator[str]:
    call = alike[0]
    many = f"   (× {len(alike)} alike)" if len(alike) > 1 else ""
    for number, block in enumerate(call.blocks):
        if not block.changed:
            continue
        name = f":{call.before.name}" if call.before.name else ""
        label = f" {block.label}" if len(call.blocks) > 1 else ""
        times = f" × {block.length}" if block.length not in (1, None) else ""
        what = f"{call.before.primitive}{name}{label}{times}{many}"
        yield f"{_indent(depth)}  {what} {_place(call.before)}".rstrip()
        yield from _blocks([each.blocks[number] for each in alike], depth + 1)


def _place(equation: Equation) -> str:
    return f"· {equation.place}" if equation.place else ""


def _region(first: Region, alike: Sequence[Region], depth: int) -> Iterator[str]:
    heading, reasons = _heading(first, alike)
    joined = " · ".join([heading, *reasons])
    fits = len(joined) + 2 * depth + 3 <= WIDTH
    yield f"{_indent(depth)}@@ {joined if fits else heading}"
    stays = [f"{n.name} ({_kind(n)}): {n.reason}" for n in first.notes if n.kind in _STAYS]
    for remark in [*([] if fits else reasons), *stays]:
        yield f"{_indent(depth)}  # {remark}"
    for sign, side in (("-", first.before), ("+", first.after)):
        for line in _shortened(side):
            if isinstance(line, str):
                yield f"{sign} {_indent(depth)}{line}"
            else:
                yield _with_cost(f"{sign} {_indent(depth)}{line}", line)


def _heading(first: Region, alike: Sequence[Region]) -> tuple[str, list[str]]:
    """What a region is, and the rules and reasons of the plan."""
    columns = zip(*([site.name for site in region.sites] for region in alike), strict=False)
    names = common_name([name for column in columns for name in column])
    times = [region.milliseconds for region in alike]
    known = [time for time in times if time is not None]
    total = (sum(b for b, _ in known), sum(a for _, a in known)) if known else None
    sizes = [region.bytes for region in alike]
    size = sum(b for b, _ in sizes), sum(a for _, a in sizes)
    parts = [f"× {len(alike)}"] if len(alike) > 1 else []
    if names:
        parts.append(names)
    elif not (first.before and first.after):
        parts.append("removed" if first.before else "added")
    parts += [gain(size, total)] if any(size) else []
    parts.append(next((e.place for e in (*first.before, *first.after) if e.place), ""))
    reasons = [f"{type(site.rule).__name__}: {site.reason}" for site in first.sites]
    return " · ".join(filter(None, parts)), list(dict.fromkeys(reasons))


def _kind(note: Note) -> str:
    return note.site.kind if note.site is not None else "in no site"


def _noted(rows: Sequence[Row], depth: int) -> Iterator[str]:
    """Sites that stay, and layers in no site, with the reason."""
    equations = [row.equation for row in rows if isinstance(row, Same)]
    kept = ([n for n in equation.notes if n.kind in _STAYS] for equation in equations)
    for notes in zip(*kept, strict=False):
        many = f"× {len(notes)} " if len(notes) > 1 else ""
        name = common_name([note.name for note in notes])
        yield f"{_indent(depth)}! {many}{name} ({_kind(notes[0])}) stays: {notes[0].reason}"


def _shortened(side: Sequence[Equation]) -> list[Equation | str]:
    """The equations, or those that read most, of which the last gives the result."""
    if len(side) <= _SHOWN + 1:
        return list(side)
    most = sorted(range(len(side) - 1), key=lambda i: (-side[i].bytes, i))[: _SHOWN - 1]
    shown = [side[i] for i in (*sorted(most), len(side) - 1)]
    return [*shown, f"… and {len(side) - _SHOWN} more equations"]


def _with_cost(line: str, equation: Equation) -> str:
    cost = [megabytes(equation.bytes)] if equation.bytes else []
    if equation.milliseconds is not None:
        cost.append(f"{equation.milliseconds:.2f} ms")
    said = "  # " + ", ".join(cost) if cost else ""
    room = WIDTH - len(said)
    return (line if len(line) <= room else line[: room - 1] + "…") + said


def _indent(depth: int) -> str:
    return "  " * depth
