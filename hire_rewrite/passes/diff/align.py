"""Pair the equations of two jaxprs: by what they compute and what they read.

Forward, equations that compute the same from equal values are paired. Backward from the results,
equations that compute the same for paired readers are, and where they do not, the new value stands
for the old one. What is left between pairs is aligned in order.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from jax.extend import core as jex_core

from hire_rewrite.passes.diff.code import Code, Inner, Line, Reader
from hire_rewrite.passes.diff.gaps import in_order, increasing
from hire_rewrite.passes.diff.keys import constant_key, type_of
from hire_rewrite.passes.diff.links import (
    carried,
    class_of,
    fed,
    holds,
    likeness,
    result_pairs,
    same_types,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
    """Two aligned jaxprs.

    Attributes:
      pairs: numbers of equations, before → after.
      equal: the numbers before of those that read equal values, or are calls that changed inside.
      stands: variables after → the one before whose place they take.
      nested: by the number before of a call that changed inside, its jaxprs: labels, the lengths
        of loops, and the alignments.
      starts: the numbers before of those of them that begin with other values.
      inner: whether they are inside of a call, whose results may be more or fewer.
      classes: for each variable before, and after, what is equal for equal values.
    """

    before: Code
    after: Code
    pairs: dict[int, int]
    equal: frozenset[int]
    stands: dict[Any, Any]
    nested: dict[int, tuple[tuple[Inner, Inner, Alignment], ...]]
    starts: frozenset[int]
    result_pairs: tuple[tuple[int, int], ...]
    classes: tuple[dict[Any, Hashable], dict[Any, Hashable]]
    inner: bool = False

    @property
    def results_changed(self) -> bool:
        """Whether it returns other values than before, all equations being as they are."""
        more = len(self.before.results) != len(self.after.results)
        return bool(self.different_results) or (more and not self.inner)

    @property
    def different_results(self) -> tuple[tuple[int, int], ...]:
        """The pairs of results that are other values."""
        return tuple(
            (i, j)
            for i, j in self.result_pairs
            if class_of(self.before.results[i], self.classes[0])
            != class_of(self.after.results[j], self.classes[1])
        )


def align(
    reader: Reader,
    before: Code,
    after: Code,
    inputs: tuple[Sequence[Hashable], Sequence[Hashable]],
    results: Sequence[tuple[int, int]],
    *,
    inner: bool = False,
) -> Alignment:
    """Align two jaxprs.

    Args:
      reader: has read both.
      inputs: for each input of both, what is equal for those that hold equal values.
      results: pairs of numbers of results that mean the same.
      starts: the numbers before of those of them that begin with other values.
      inner: whether they are inside of a call.
    """
    aligner = _Aligner(reader, before, after, results)
    aligner.solve(inputs)
    return dataclasses.replace(aligner.finish(), inner=inner)


class _Aligner:
    def __init__(
        self, reader: Reader, old: Code, new: Code, results: Sequence[tuple[int, int]]
    ) -> None:
        self.reader, self.old, self.new, self.results = reader, old, new, tuple(results)
        self.old_classes: dict[Any, Hashable] = {}
        self.new_classes: dict[Any, Hashable] = {}
        self.old_signs: list[int] = []
        self.forced: dict[int, int] = {}
        self.stands: dict[Any, Any] = {}
        self.pairs: dict[int, int] = {}
        self.by_new: dict[int, int] = {}
        self._keys = tuple([line.key for line in code.lines] for code in (old, new))
        self.old_place = _places(old)
        self.new_place = _places(new)

    def solve(self, inputs: tuple[Sequence[Hashable], Sequence[Hashable]]) -> None:
        sides = (self.old, self.old_classes), (self.new, self.new_classes)
        for (code, classes), given in zip(sides, inputs, strict=True):
            classes.update(zip(code.inputs, given, strict=True))
            classes.update((v, ("const", constant_key(c))) for v, c in code.constants.items())
        self.old_signs = [
            self._number(line, effect, self.old_classes) for line, effect in _effects(self.old)
        ]
        self._forward()
        while self._backward() or self._gaps():
            self._forward()

    # Forward.

    def _number(self, line: Line, effect: int | None, classes: dict[Any, Hashable]) -> int:
        """A number for what the equation computes; its results get it as their class."""
        sign = self.reader.number((line.key, effect, *(class_of(v, classes) for v in line.ins)))
        classes.update((var, (sign, k)) for k, var in enumerate(line.outs))
        return sign

    def _same(self, v: Any, w: Any) -> bool:
        """Whether a value before and one after are equal."""
        return class_of(v, self.old_classes) == class_of(w, self.new_classes)

    def _forward(self) -> None:
        waiting: dict[int, collections.deque[int]] = collections.defaultdict(collections.deque)
        fixed = set(self.forced.values())
        for i, sign in enumerate(self.old_signs):
            if i not in fixed:
                waiting[sign].append(i)
        self.by_new = dict(self.forced)
        for j, (line, effect) in enumerate(_effects(self.new)):
            sign = self._number(line, effect, self.new_classes)
            if j in self.forced:
                was = self.old.lines[self.forced[j]]
                for k, m in same_types(was.outs, line.outs):
                    self.new_classes[line.outs[m]] = self.old_classes[was.outs[k]]
            elif waiting[sign]:
                self.by_new[j] = waiting[sign].popleft()
            for var in line.outs:
                if var in self.stands:
                    self.new_classes[var] = self.old_classes[self.stands[var]]
        self.pairs = {i: j for j, i in self.by_new.items()}

    # Backward.

    def _backward(self) -> bool:
        """Pair what paired readers read; whether anything was found."""
        work = [(self.old.results[i], self.new.results[j]) for i, j in reversed(self.results)]
        for i, j in sorted(self.pairs.items(), reverse=True):
            work += self._reads(i, j)
        found = False
        taken = {self.new_classes[v] for line in self.new.lines for v in line.outs}
        targets = set(self.stands.values())
        while work:
            v, w = work.pop()
            if any(isinstance(atom, jex_core.Literal) for atom in (v, w)):
                continue
            if self._same(v, w) or type_of(v) != type_of(w):
                continue
            (i, k), (j, m) = self.old_place.get(v, (-1, 0)), self.new_place.get(w, (-1, 0))
            if min(i, j) < 0 or i in self.pairs or j in self.by_new:
                continue
            unused = w not in self.stands and v not in targets
            if k == m and self._alike(i, j):
                self._pair(i, j)
                work += self._reads(i, j)
                found = True
            elif unused and class_of(v, self.old_classes) not in taken:
                self.stands[w] = v
                targets.add(v)
                found = True
        return found

    def _alike(self, i: int, j: int) -> bool:
        return bool(likeness(self.old.lines[i], self.new.lines[j]))

    def _pair(self, i: int, j: int) -> None:
        self.forced[j] = i
        self.pairs[i], self.by_new[j] = j, i

    def _reads(self, i: int, j: int) -> Iterator[tuple[Any, Any]]:
        a, b = self.old.lines[i], self.new.lines[j]
        if a.key == b.key:
            yield from zip(a.ins, b.ins, strict=True)
            return
        for old, new in zip(a.inner, b.inner, strict=False):
            olds, news = holds(a, old, self.old_classes), holds(b, new, self.new_classes)
            for n, m in fed(old, new, olds, news):
                places = old.roles[n][1], new.roles[m][1]
                if places[0] is not None and places[1] is not None:
                    yield a.ins[places[0]], b.ins[places[1]]

    # In order.

    def _gaps(self) -> bool:
        """Pair what stands between pairs, in order; whether anything was found."""
        found = False
        for olds, news in self._between():
            for i, j in in_order(olds, news, self._score, self._keys):
                self._pair(i, j)
                found = True
        return found

    def _between(self) -> list[tuple[list[int], list[int]]]:
        fixed = increasing(sorted(self.pairs.items()))
        ends = [(-1, -1), *fixed, (len(self.old.lines), len(self.new.lines))]
        gaps = []
        for (i1, j1), (i2, j2) in itertools.pairwise(ends):
            olds = [i for i in range(i1 + 1, i2) if i not in self.pairs]
            news = [j for j in range(j1 + 1, j2) if j not in self.by_new]
            if olds and news:
                gaps.append((olds, news))
        return gaps

    def _score(self, i: int, j: int) -> float:
        a, b = self.old.lines[i], self.new.lines[j]
        score = likeness(a, b)
        if score and a.key == b.key:
            same = sum(self._same(v, w) for v, w in self._reads(i, j))
            score += 2.0 * same / max(len(a.ins), 1)
        return score + 0.5 * (a.source == b.source) if score else 0.0

    # The end.

    def finish(self) -> Alignment:
        equal: set[int] = set()
        nested: dict[int, tuple[tuple[Inner, Inner, Alignment], ...]] = {}
        for i, j in self.pairs.items():
            a, b = self.old.lines[i], self.new.lines[j]
            if a.key == b.key and all(self._same(v, w) for v, w in self._reads(i, j)):
                equal.add(i)
            elif a.key != b.key:
                nested[i] = tuple(self._nested(a, b))
                equal.add(i)
        other = (i for i in nested if not self._begins_alike(i, self.pairs[i]))
        return Alignment(
            self.old, self.new, self.pairs, frozenset(equal), self.stands, nested,
            frozenset(other), self.results, (self.old_classes, self.new_classes),
        )  # fmt: skip

    def _begins_alike(self, i: int, j: int) -> bool:
        """Whether two loops carry equal values into their first iteration."""
        a, b = self.old.lines[i], self.new.lines[j]
        for old, new in zip(a.inner, b.inner, strict=False):
            olds, news = holds(a, old, self.old_classes), holds(b, new, self.new_classes)
            if any(olds[n] != news[m] for n, m in carried(old, new, olds, news)):
                return False
        return True

    def _nested(self, a: Line, b: Line) -> Iterator[tuple[Inner, Inner, Alignment]]:
        for old, new in zip(a.inner, b.inner, strict=False):
            olds, news = holds(a, old, self.old_classes), holds(b, new, self.new_classes)
            for n, m in carried(old, new, olds, news):
                olds[n] = news[m] = ("carry", self.reader.number(("carry", id(a), n)))
            ends = result_pairs(old, new, olds, news)
            inside = align(self.reader, old.code, new.code, (olds, news), ends, inner=True)
            yield old, new, inside


def _places(code: Code) -> dict[Any, tuple[int, int]]:
    """The equation that defines each variable, and which of its results it is."""
    return {v: (i, k) for i, line in enumerate(code.lines) for k, v in enumerate(line.outs)}


def _effects(code: Code) -> Iterator[tuple[Line, int | None]]:
    """Equations, with the order of those that do anything but compute."""
    count = itertools.count()
    return ((line, next(count) if line.eqn.effects else None) for line in code.lines)
