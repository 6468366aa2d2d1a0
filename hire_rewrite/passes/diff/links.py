"""Which equations are alike, and which of their operands and results mean the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from jax.extend import core as jex_core

from hire_rewrite.passes.diff.code import Inner, Line
from hire_rewrite.passes.diff.keys import literal_key, type_of

_ALIKE, _ALIKE_NAMED = 0.5, 0.2
"""The share of equations that two calls have in common, to be called the same one changed; and if
they have one name, of those of the shorter."""


def class_of(atom: Any, classes: dict[Any, Hashable]) -> Hashable:
    if isinstance(atom, jex_core.Literal):
        return literal_key(atom)
    return classes.get(atom, ("unknown", id(atom)))


def holds(line: Line, inner: Inner, classes: dict[Any, Hashable]) -> list[Hashable]:
    """What each input of a jaxpr inside an equation holds."""
    held: list[Hashable] = []
    for n, (role, operand) in enumerate(inner.roles):
        if operand is None:
            held.append(("input", n, type_of(inner.code.inputs[n])))
            continue
        outer = class_of(line.ins[operand], classes)
        held.append(outer if role == "const" else (role, outer))
    return held


def carried(
    old: Inner, new: Inner, olds: Sequence[Hashable], news: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Pairs of carries: all in order if they are of the same types, or else those that begin alike
    first, then those of one type."""
    ours, theirs = _inputs(old, "carry"), _inputs(new, "carry")
    if [_type(old, n) for n in ours] == [_type(new, m) for m in theirs]:
        return list(zip(ours, theirs, strict=True))
    return _matched(old, new, ours, theirs, olds, news)


def fed(
    old: Inner, new: Inner, olds: Sequence[Hashable], news: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Pairs of inputs that are likely to hold the same, of each role."""
    pairs = carried(old, new, olds, news)
    for role in dict.fromkeys(role for role, _ in old.roles if role != "carry"):
        pairs += _matched(old, new, _inputs(old, role), _inputs(new, role), olds, news)
    return pairs


def _matched(
    old: Inner,
    new: Inner,
    ours: Sequence[int],
    theirs: Sequence[int],
    olds: Sequence[Hashable],
    news: Sequence[Hashable],
) -> list[tuple[int, int]]:
    """Pairs of inputs that hold equal values, then of those of one type, in order."""
    pairs: list[tuple[int, int]] = []
    left, taken = list(theirs), set()
    for alike in (True, False):
        for n in ours:
            same = (m for m in left if _type(old, n) == _type(new, m))
            m = next((m for m in same if olds[n] == news[m] or not alike), None)
            if n not in taken and m is not None:
                pairs.append((n, m))
                left.remove(m)
                taken.add(n)
    return pairs


def _inputs(inner: Inner, role: str) -> list[int]:
    return [n for n, (its, _) in enumerate(inner.roles) if its == role]


def _type(inner: Inner, number: int) -> str:
    return type_of(inner.code.inputs[number])


def result_pairs(
    old: Inner, new: Inner, olds: Sequence[Hashable], news: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Pairs of results: those that feed paired carries, and the others in order."""
    carry_of = {news[m]: r for r, (_, feeds) in enumerate(new.outputs) for m in feeds}
    pairs = []
    for r, (_, feeds) in enumerate(old.outputs):
        pairs += [(r, carry_of[olds[n]]) for n in feeds if olds[n] in carry_of]
    left = [[r for r, (_, feeds) in enumerate(inner.outputs) if not feeds] for inner in (old, new)]
    kinds = [
        [inner.code.results[r] for r in rest]
        for inner, rest in zip((old, new), left, strict=True)
    ]  # fmt: skip
    pairs += [(left[0][k], left[1][m]) for k, m in same_types(*kinds)]
    return sorted(set(pairs))


def same_types(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[int, int]]:
    """Positions of variables of one type, the first with the first."""
    pairs, left = [], list(range(len(new)))
    for k, v in enumerate(old):
        same = next((m for m in left if type_of(new[m]) == type_of(v)), None)
        if same is not None:
            pairs.append((k, same))
            left.remove(same)
    return pairs


def likeness(a: Line, b: Line) -> float:
    """How alike two equations are; 0 if they are not the same one in any sense."""
    if a.key == b.key:
        return 4.0
    if a.primitive != b.primitive or not a.inner or len(a.inner) != len(b.inner):
        return 0.0
    named = a.name == b.name
    if not named and (a.is_site or b.is_site):
        return 0.0
    common = sum((a.primitives & b.primitives).values()) - 1
    totals = a.primitives.total() - 1, b.primitives.total() - 1
    share = common / max(min(totals) if named else max(totals), 1)
    return 1.0 + share if share >= (_ALIKE_NAMED if named else _ALIKE) else 0.0
