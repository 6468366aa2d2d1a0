"""Group the equations that are not in both jaxprs: what hangs together is one region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex_core

from hire_rewrite.passes.diff.align import Alignment


def regions_of(aligned: Alignment) -> list[tuple[list[int], list[int]]]:
    """The equations that are not in both, in groups that hang together."""
    olds = [i for i in range(len(aligned.before.lines)) if i not in aligned.equal]
    kept = {aligned.pairs[i] for i in aligned.equal}
    news = [j for j in range(len(aligned.after.lines)) if j not in kept]
    groups = _Groups([*((0, i) for i in olds), *((1, j) for j in news)])
    sides = ((aligned.before, olds), (aligned.after, news))
    makers: list[dict[Any, int]] = [
        {var: n for n in numbers for var in code.lines[n].outs} for code, numbers in sides
    ]
    for i in olds:
        if i in aligned.pairs:
            groups.join((0, i), (1, aligned.pairs[i]))
    for w, v in aligned.stands.items():
        if v in makers[0] and w in makers[1]:
            groups.join((0, makers[0][v]), (1, makers[1][w]))
    for side, (code, numbers) in enumerate(sides):
        for n in numbers:
            for var in code.lines[n].ins:
                if not isinstance(var, jex_core.Literal) and var in makers[side]:
                    groups.join((side, n), (side, makers[side][var]))
    return [
        ([n for side, n in group if side == 0], [n for side, n in group if side == 1])
        for group in groups.all()
    ]


class _Groups:
    """Disjoint sets."""

    def __init__(self, items: Sequence[tuple[int, int]]) -> None:
        self._above = {item: item for item in items}

    def _top(self, item: tuple[int, int]) -> tuple[int, int]:
        while self._above[item] != item:
            self._above[item] = self._above[self._above[item]]
            item = self._above[item]
        return item

    def join(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        a, b = sorted((self._top(a), self._top(b)))
        self._above[b] = a

    def all(self) -> list[list[tuple[int, int]]]:
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for item in self._above:
            groups.setdefault(self._top(item), []).append(item)
        return list(groups.values())
