"""Make the values of a diff from an alignment: names, regions, and what the plan says of them."""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.extend import core as jex_core

from hire_rewrite.passes.diff.align import Alignment
from hire_rewrite.passes.diff.code import Code, Inner, Line
from hire_rewrite.passes.diff.keys import type_of
from hire_rewrite.passes.diff.notes import Notes, Path
from hire_rewrite.passes.diff.reads import bytes_read, stacks_inside
from hire_rewrite.passes.diff.regions import regions_of
from hire_rewrite.passes.diff.value import Block, Call, Equation, Listing, Note, Region, Row, Same

Names = dict[Any, str]


@dataclasses.dataclass(frozen=True)
class _Around:
    """Where a block stands: the path of equations, the words for it, how often it runs, and in a
    site the values that hold a layer for each run."""

    path: Path = ()
    inside: tuple[str, ...] = ()
    runs: int | None = 1
    stacks: frozenset[Any] = frozenset()


class Builder:
    """Builds the blocks of one diff.

    Args:
      notes: what the plan says of the function before.
      taken: names that no value may get.
    """

    def __init__(self, notes: Notes, taken: Sequence[str]) -> None:
        self._notes = notes
        reserved = set(taken)
        self._fresh = (name for name in _letters() if name not in reserved)

    def block(
        self,
        aligned: Alignment,
        old: Names,
        new: Names,
        label: str = "",
        length: int | None = 1,
        around: _Around | None = None,
    ) -> Block:
        """The rows of two aligned jaxprs.

        Args:
          old, new: names of the inputs of both; those of other values are added.
        """
        around = around or _Around()
        self._name(aligned, old, new)
        items: list[tuple[tuple[float, int], Row]] = []
        place = 0.5
        gone: dict[int, float] = {}
        for i, line in enumerate(aligned.before.lines):
            if i not in aligned.equal:
                gone[i] = place
                continue
            j = aligned.pairs[i]
            place = j + 0.5
            if i in aligned.nested:
                after = aligned.after.lines[j]
                if i in aligned.starts:
                    sides = [
                        self._equation(each, names, around, notes=False, inner=False)
                        for each, names in ((line, old), (after, new))
                    ]
                    start = Region((sides[0],), (sides[1],), around.inside, around.runs)
                    items.append(((float(j), -2), start))
                row: Row = self._call(line, after, aligned.nested[i], old, new, around)
            else:
                row = Same(self._equation(line, old, around))
            items.append(((float(j), -1), row))
        for number, (olds, news) in enumerate(regions_of(aligned)):
            first = float(min(news)) if news else gone[min(olds)]
            items.append(((first, number), self._region(aligned, olds, news, old, new, around)))
        items.sort(key=lambda item: item[0])
        rows = [row for _, row in items]
        results = _read(aligned.before.results, old), _read(aligned.after.results, new)
        if aligned.results_changed:
            ends = [Equation((), "return", reads=names) for names in results]
            rows.append(Region((ends[0],), (ends[1],), around.inside, around.runs))
        return Block(label, tuple(rows), length, results)

    # Names.

    def _name(self, aligned: Alignment, old: Names, new: Names) -> None:
        for code, names in ((aligned.before, old), (aligned.after, new)):
            for var in code.constants:
                names[var] = f"closure[{type_of(var)}]"
        self._letters_for(aligned.before, old)
        by_new = {j: i for i, j in aligned.pairs.items()}
        for j, line in enumerate(aligned.after.lines):
            was = aligned.before.lines[by_new[j]].outs if j in by_new else ()
            for var, name in _paired_names(was, line.outs, old):
                new[var] = name
            for var in line.outs:
                if var in aligned.stands:
                    new[var] = old[aligned.stands[var]]
        self._letters_for(aligned.after, new)

    def _letters_for(self, code: Code, names: Names) -> None:
        for var in (*code.inputs, *(v for line in code.lines for v in line.outs)):
            if var not in names:
                names[var] = "_" if _dropped(var) else next(self._fresh)

    def _inner_names(self, line: Line, inner: Inner, names: Names) -> Names:
        """Names of the inputs of a jaxpr inside an equation, as far as the outside tells."""
        given: Names = {}
        for var, (role, operand) in zip(inner.code.inputs, inner.roles, strict=True):
            if operand is None or role == "carry":
                continue
            atom = line.ins[operand]
            if isinstance(atom, jex_core.Literal):
                continue
            given[var] = f"{names[atom]}[i]" if role == "slice" else names[atom]
        return given

    # Rows.

    def _call(
        self,
        a: Line,
        b: Line,
        parts: Sequence[tuple[Inner, Inner, Alignment]],
        old: Names,
        new: Names,
        around: _Around,
    ) -> Row:
        before = self._equation(a, old, around, inner=False)
        word = before.primitive + (f":{before.name}" if before.name else "")
        blocks = []
        for ours, theirs, aligned in parts:
            inside = _inside(around, a, ours, word)
            names = self._inner_names(a, ours, old), self._inner_names(b, theirs, new)
            self._carry_names(aligned, names)
            blocks.append(self.block(aligned, *names, ours.label, ours.length, inside))
        if not any(block.changed for block in blocks):
            return Same(self._equation(a, old, around))
        after = self._equation(b, new, around, inner=False)
        # A site in a loop is given all layers, and reads what the plan says.
        after = dataclasses.replace(after, bytes=sum(map(_bytes_after, blocks)))
        return Call(before, after, tuple(blocks))

    def _carry_names(self, aligned: Alignment, names: tuple[Names, Names]) -> None:
        """Carries of both sides that are paired get one name."""
        known: dict[Any, str] = {}
        for var in aligned.before.inputs:
            if var not in names[0]:
                names[0][var] = next(self._fresh)
            known.setdefault(aligned.classes[0][var], names[0][var])
        for var in aligned.after.inputs:
            name = known.get(aligned.classes[1][var])
            if name is not None and var not in names[1]:
                names[1][var] = name

    def _region(
        self,
        aligned: Alignment,
        olds: Sequence[int],
        news: Sequence[int],
        old: Names,
        new: Names,
        around: _Around,
    ) -> Region:
        before = [self._equation(aligned.before.lines[i], old, around) for i in olds]
        after = [self._equation(aligned.after.lines[j], new, around, notes=False) for j in news]
        notes = _distinct([note for equation in before for note in equation.notes])
        after = _costs(after, [note for note in notes if note.kind == "rewritten"])
        return Region(tuple(before), tuple(after), around.inside, around.runs, notes)

    def _equation(
        self,
        line: Line,
        names: Names,
        around: _Around,
        *,
        notes: bool = True,
        inner: bool = True,
    ) -> Equation:
        path = (*around.path, id(line.eqn))
        file, number, function = line.source
        results = tuple((names.get(v, "_"), type_of(v)) for v in line.outs if not _dropped(v))
        listings = [self._listing(line, part, names, around) for part in line.inner if inner]
        return Equation(
            results=results,
            primitive=line.primitive,
            name=line.name,
            params=tuple((name, text) for name, text in line.params if name != "name"),
            reads=_read(line.ins, names),
            file=file,
            line=number,
            function=function,
            bytes=bytes_read(line, around.stacks) * (around.runs or 1),
            milliseconds=self._notes.milliseconds.get(path) if notes else None,
            notes=self._notes.at(path) if notes and inner else (),
            inner=tuple(listings),
        )

    def _listing(self, line: Line, inner: Inner, names: Names, around: _Around) -> Listing:
        stacks = around.stacks
        if line.is_site:  # what is packed has an axis of layers
            stacks = frozenset(v for v, name in names.items() if self._notes.is_packed(name))
        stacks = stacks_inside(line, inner, stacks)
        around = dataclasses.replace(_inside(around, line, inner, line.primitive), stacks=stacks)
        inside = self._inner_names(line, inner, names)
        inside |= {v: f"closure[{type_of(v)}]" for v in inner.code.constants}
        self._letters_for(inner.code, inside)
        lines = [self._equation(each, inside, around) for each in inner.code.lines]
        end = Equation((), "return", reads=_read(inner.code.results, inside))
        return Listing(inner.label, (*lines, end))


def _inside(around: _Around, line: Line, inner: Inner, word: str) -> _Around:
    runs = None if inner.length is None or around.runs is None else inner.length * around.runs
    times = f" ×{inner.length}" if inner.length not in (1, None) else ""
    label = f"{word} {inner.label}" if len(line.inner) > 1 else word
    return _Around((*around.path, id(line.eqn)), (*around.inside, label + times), runs)


def _bytes_after(block: Block) -> int:
    """What the equations of a block read in one call, after."""
    size = 0
    for row in block.rows:
        if isinstance(row, Region):
            size += sum(equation.bytes for equation in row.after)
        else:
            size += (row.after if isinstance(row, Call) else row.equation).bytes
    return size


def _costs(after: Sequence[Equation], notes: Sequence[Note]) -> list[Equation]:
    """Equations after, those that run a site with what the plan says that it reads and takes."""
    calls = [e for e in after if e.is_site]
    costed = []
    for equation in after:
        own = [note for note in notes if any(_of_site(read, note) for read in equation.reads)]
        if len(calls) == 1:
            own = list(notes)
        if equation in calls and own:
            times = [note.milliseconds for note in own if note.milliseconds is not None]
            equation = dataclasses.replace(
                equation,
                bytes=sum(note.site.bytes_after for note in own if note.site is not None),
                milliseconds=sum(t for _, t in times) if len(times) == len(own) else None,
            )
        costed.append(equation)
    return costed


def _distinct(notes: Sequence[Note]) -> tuple[Note, ...]:
    """Notes, each once; a part of a site is not one beside the whole."""
    whole = {note.name for note in notes if note.kind == "rewritten"}
    return tuple(
        note for note in dict.fromkeys(notes) if note.kind != "part" or note.name not in whole
    )


def _of_site(read: str, note: Note) -> bool:
    return bool(note.packed) and read.startswith(f"{note.packed}:")


def _paired_names(
    old: Sequence[Any], new: Sequence[Any], names: Mapping[Any, str]
) -> Iterator[tuple[Any, str]]:
    """Names for variables of the new equation: of the first of equal type on the old one."""
    free = [var for var in old if not _dropped(var)]
    for var in new:
        same = next((v for v in free if type_of(v) == type_of(var)), None)
        if same is not None and not _dropped(var):
            free.remove(same)
            yield var, names[same]


def _read(atoms: Sequence[Any], names: Mapping[Any, str]) -> tuple[str, ...]:
    return tuple(
        _number(atom.val) if isinstance(atom, jex_core.Literal) else names.get(atom, "_")
        for atom in atoms
    )


def _number(value: Any) -> str:
    text = str(value)
    if getattr(value, "size", 1) > 1 or len(text) > 24:
        return f"array[{getattr(value, 'shape', '')}]"
    return text


def _dropped(var: Any) -> bool:
    return isinstance(var, jex_core.DropVar) or type(var).__name__ == "DropVar"


def _letters() -> Iterator[str]:
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))
