"""What stands together in every form of a diff: unchanged stretches, and rows that are alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeAlias

from hire_rewrite.names import common_name
from hire_rewrite.passes.diff.value import (
    Block,
    Call,
    Equation,
    Note,
    Region,
    Same,
    megabytes,
)

_STAYS = ("dense", "rejected")


@dataclasses.dataclass
class Stretch:
    """Equations that both have, of the first of some blocks that are alike."""

    equations: list[Equation]


@dataclasses.dataclass
class Regions:
    """Regions that differ in names alone."""

    rows: list[Region]


@dataclasses.dataclass
class Calls:
    """Calls that changed inside, and differ in names alone."""

    rows: list[Call]


@dataclasses.dataclass
class Stays:
    """Unchanged equations of which the plan says the same."""

    equations: list[Equation]

    @property
    def remarks(self) -> list[str]:
        """What stays, and why."""
        return [
            remark.replace("): ", ") stays: ", 1) for remark in _remarks(self.equations, many=True)
        ]


Part: TypeAlias = Stretch | Regions | Calls | Stays


def parts_of(alike: Sequence[Block]) -> list[Part]:
    """The parts of blocks that differ in names alone, as one; alike rows at the place of the first.

    A row is alike others of its block, and those in its place in the other blocks.
    """
    known: dict[Hashable, Any] = {}
    parts: list[Part] = []
    for column in zip(*(block.rows for block in alike), strict=True):
        row = column[0]
        if isinstance(row, Same):
            equations = [each.equation for each in column if isinstance(each, Same)]
            stays = [note for note in row.equation.notes if note.kind in _STAYS]
            if not stays:
                if not parts or not isinstance(parts[-1], Stretch):
                    parts.append(Stretch([]))
                parts[-1].equations.append(row.equation)  # type: ignore[union-attr]
                continue
            _add(parts, known, ("stays", *((n.kind, n.reason) for n in stays)), Stays(equations))
        elif isinstance(row, Region):
            _add(parts, known, row.shape, Regions([r for r in column if isinstance(r, Region)]))
        else:
            _add(parts, known, row.shape, Calls([r for r in column if isinstance(r, Call)]))
    return parts


def _add(parts: list[Part], known: dict[Hashable, Any], key: Hashable, part: Any) -> None:
    if key not in known:
        known[key] = part
        parts.append(part)
    elif isinstance(part, Stays):
        known[key].equations += part.equations
    else:
        known[key].rows += part.rows


# Words.


def as_before(stretch: Stretch) -> str:
    """How many equations did not change."""
    count = len(stretch.equations)
    return f"… {count} equation{'s' * (count != 1)} as before"


def called(alike: Sequence[Call], number: int) -> str:
    """What a call is, by one of its jaxprs."""
    call = alike[0]
    block = call.blocks[number]
    name = f":{call.before.name}" if call.before.name else ""
    label = f" {block.label}" if len(call.blocks) > 1 else ""
    times = f" × {block.length}" if block.length not in (1, None) else ""
    many = f"   (× {len(alike)} alike)" if len(alike) > 1 else ""
    place = f" · {call.before.place}" if call.before.place else ""
    return f"{call.before.primitive}{name}{label}{times}{many}{place}"


def headline(alike: Sequence[Region]) -> tuple[str, list[str]]:
    """What regions are that differ in names alone: sites, bytes, times and place; and the rules,
    with the reasons of the plan."""
    first = alike[0]
    columns = zip(*([site.name for site in region.sites] for region in alike), strict=False)
    names = common_name([name for column in columns for name in column])
    known = [region.milliseconds for region in alike]
    times = [time for time in known if time is not None]
    total = (sum(b for b, _ in times), sum(a for _, a in times)) if times else None
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


def remarks(alike: Sequence[Region]) -> list[str]:
    """What the plan says of sites in regions that were not rewritten as such."""
    found = (
        (f"{note.name} ({_kind(note)}): {note.reason}")
        for note in alike[0].notes
        if note.kind in _STAYS
    )
    return list(dict.fromkeys(found))


def _remarks(equations: Sequence[Equation], *, many: bool) -> Iterator[str]:
    kept = ([n for n in equation.notes if n.kind in _STAYS] for equation in equations)
    for notes in zip(*kept, strict=False):
        count = f"× {len(notes)} " if many and len(notes) > 1 else ""
        name = common_name([note.name for note in notes])
        yield f"{count}{name} ({_kind(notes[0])}): {notes[0].reason}"


def _kind(note: Note) -> str:
    return note.site.kind if note.site is not None else "in no site"


def gain(sizes: tuple[int, int], milliseconds: tuple[float, float] | None) -> str:
    """What is read before and after, and how long that takes by the estimate."""
    words = f"{megabytes(sizes[0])} → {megabytes(sizes[1])}"
    if milliseconds is not None and milliseconds[1] > 0:
        slow, fast = milliseconds
        words += f", {slow:.2f} → {fast:.2f} ms ({slow / fast:.2f} ×)"
    return words


def summary(diff: Any) -> list[str]:
    """What a `Diff` comes to: sites and arguments, and what is read."""
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
    estimated = ", by the estimate" if diff.milliseconds is not None else ""
    read = f"read where it changed: {gain(diff.bytes, diff.milliseconds)}{estimated}"
    return ["; ".join(parts), read] if parts else [read]
