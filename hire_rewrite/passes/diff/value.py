"""A diff as values: blocks of rows, each unchanged, a changed region, or a call changed inside."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeAlias

from hire_rewrite.plan import Site

_LONGEST = 40
"""Characters of a parameter that a line of text shows."""


@dataclasses.dataclass(frozen=True)
class Note:
    """What the plan says of a place in the graph.

    Attributes:
      name: of the site, or of the weight of a layer in no site.
      kind: `"rewritten"` (at the last product of a site), `"part"` (the rest of a rewritten site),
        `"dense"` (a site that stays) or `"rejected"` (a layer in no site).
      reason: the plan's.
      site: the site as the plan has it, if it is one.
      packed: the name under which its arrays are packed.
      milliseconds: estimated for one call, dense and rewritten, if the machine's times are known.
    """

    name: str
    kind: str
    reason: str
    site: Site | None = None
    packed: str = ""
    milliseconds: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """A jaxpr inside an equation that only one side has, or that is as it was."""

    label: str
    equations: tuple[Equation, ...]


@dataclasses.dataclass(frozen=True)
class Equation:
    """One equation of one side; prints as a line.

    Attributes:
      results: names and types.
      primitive: its primitive; `"return"` for the results of a function.
      name: what the called function is called, if it is a call.
      params: parameters that are not in the types, as text.
      reads: names of its operands: paths of inputs, letters, or numbers.
      file, line, function: the user's code that made it; empty and 0 if that is not known.
      bytes: how much of its operands it reads in one call of the function, loops included.
      milliseconds: estimated for one call; None if the cost model does not know.
      notes: what the plan says of it.
      inner: the jaxprs inside it.
    """

    results: tuple[tuple[str, str], ...]
    primitive: str
    name: str = ""
    params: tuple[tuple[str, str], ...] = ()
    reads: tuple[str, ...] = ()
    file: str = ""
    line: int = 0
    function: str = ""
    bytes: int = 0
    milliseconds: float | None = None
    notes: tuple[Note, ...] = ()
    inner: tuple[Listing, ...] = ()

    def __str__(self) -> str:
        bound = " ".join(f"{name}:{kind}" for name, kind in self.results)
        what = f"{self.primitive}:{self.name}" if self.name else self.primitive
        if self.params:
            shown = (t if len(t) <= _LONGEST else "…" for _, t in self.params)
            words = (f"{p}={t}" for (p, _), t in zip(self.params, shown, strict=True) if t != "…")
            said = " ".join(words)
            what += f"[{said}]" if said else ""
        text = " ".join([what, *folded(self.reads)])
        return f"{bound} = {text}" if bound else text

    @property
    def is_site(self) -> bool:
        """Whether it is the call of a rewritten site."""
        return self.name.startswith("hire_")

    @property
    def place(self) -> str:
        """The file's name and the line, as `model.py:12`."""
        return f"{os.path.basename(self.file)}:{self.line}" if self.file else ""

    @functools.cached_property
    def shape(self) -> Hashable:
        """Equal for equations that differ in names alone."""
        kinds = tuple(kind for _, kind in self.results)
        return kinds, self.primitive, self.name, self.params, len(self.reads)


@dataclasses.dataclass(frozen=True)
class Same:
    """An equation that both have; by its names before."""

    equation: Equation

    @functools.cached_property
    def shape(self) -> Hashable:
        """Equal for rows that differ in names alone."""
        return "same", self.equation.shape


@dataclasses.dataclass(frozen=True)
class Region:
    """Equations in the place of others: as many as hang together.

    Attributes:
      before, after: the equations, in order; either may be empty.
      inside: the loops and calls around, outermost first.
      runs: how often it runs in one call of the function; None if that is not known.
      notes: what the plan says of the equations before.
    """

    before: tuple[Equation, ...]
    after: tuple[Equation, ...]
    inside: tuple[str, ...] = ()
    runs: int | None = 1
    notes: tuple[Note, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The rewritten sites that caused it; none where two functions are compared."""
        kinds = ("rewritten", "part")
        sites = (note.site for note in self.notes if note.kind in kinds)
        return tuple(dict.fromkeys(site for site in sites if site is not None))

    @property
    def rules(self) -> tuple[Any, ...]:
        """The rules of its sites, each once."""
        return tuple(dict.fromkeys(site.rule for site in self.sites if site.rule is not None))

    @property
    def bytes(self) -> tuple[int, int]:
        """What it reads in one call, before and after: of its sites what the plan says, and else
        what its equations do."""
        whole = [note.site for note in self._rewritten if note.site is not None]
        if whole:
            return sum(s.bytes_before for s in whole), sum(s.bytes_after for s in whole)
        return sum(e.bytes for e in self.before), sum(e.bytes for e in self.after)

    @property
    def milliseconds(self) -> tuple[float, float] | None:
        """Estimated for one call, before and after, where the cost model knows all of its sites."""
        times = [note.milliseconds for note in self._rewritten]
        known = [time for time in times if time is not None]
        if not known or len(known) < len(times):
            return None
        return sum(before for before, _ in known), sum(after for _, after in known)

    @property
    def _rewritten(self) -> list[Note]:
        return [note for note in self.notes if note.kind == "rewritten"]

    @functools.cached_property
    def shape(self) -> Hashable:
        """Equal for regions that differ in names alone."""
        notes = tuple((note.kind, note.site and note.site.rule) for note in self.notes)
        sides = tuple(tuple(e.shape for e in side) for side in (self.before, self.after))
        return "region", *sides, notes, self.runs


@dataclasses.dataclass(frozen=True)
class Call:
    """A loop, branch or call that both have, and that changed inside.

    Attributes:
      before, after: the equation of each side.
      blocks: the jaxprs inside it.
    """

    before: Equation
    after: Equation
    blocks: tuple[Block, ...]

    @functools.cached_property
    def shape(self) -> Hashable:
        """Equal for calls that differ in names alone."""
        return "call", self.before.primitive, tuple(block.shape for block in self.blocks)


Row: TypeAlias = Same | Region | Call


@dataclasses.dataclass(frozen=True)
class Block:
    """The rows of a jaxpr, in order.

    Attributes:
      label: what the jaxpr is to its equation; empty for the whole function.
      length: how often it runs in each run of the equation; None if that is not known.
      results: the names of its results, before and after.
    """

    label: str
    rows: tuple[Row, ...]
    length: int | None = 1
    results: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @functools.cached_property
    def shape(self) -> Hashable:
        """Equal for blocks that differ in names alone."""
        return self.label, self.length, tuple(row.shape for row in self.rows)

    @property
    def changed(self) -> bool:
        """Whether any of it differs."""
        return any(not isinstance(row, Same) for row in self.rows)

    def regions(self) -> Iterator[Region]:
        """Its regions at any depth, in order."""
        for row in self.rows:
            if isinstance(row, Region):
                yield row
            elif isinstance(row, Call):
                for block in row.blocks:
                    yield from block.regions()


@dataclasses.dataclass(frozen=True)
class Argument:
    """An array that either function is given, by its path; a type is None where it is not."""

    path: str
    before: str | None
    after: str | None
    bytes: int


def folded(names: Sequence[str]) -> list[str]:
    """Packed arrays of one site that follow each other as one word, as `params/embed:*3`."""
    words: list[str] = []
    for folder, group in itertools.groupby(names, _site_folder):
        inside = list(group)
        words += [f"{folder}:*{len(inside)}"] if folder and len(inside) > 1 else inside
    return words


def _site_folder(name: str) -> str:
    """The site of a packed array."""
    return name.rpartition(":")[0] if "[" not in name.rpartition(":")[2] else ""


def megabytes(size: float) -> str:
    """Bytes as text, as `113.2 MB`."""
    if size >= 1e5:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e3:.1f} kB" if size >= 1e3 else f"{size:.0f} B"
