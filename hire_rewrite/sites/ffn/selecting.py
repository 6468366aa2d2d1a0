"""What a block selects among its own neurons: how many, and whether its gates alone say which.

Found by running it, as the activation is: on rows of many sizes and distributions, another for each
token. What a program is given when it runs cannot be tried in all its values; so far as it reaches
what decides, the gates do not decide alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from hire_rewrite.patterns.region import Region

_POWERS = (-40, 0, 40)
"""Rows are multiplied by these powers of two; of float16 by fewer."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a region selects.

    Attributes:
      exact: whether it sorts; otherwise a statistic selects.
      keeps: how many, by a count on random numbers.
      gate: the projection whose numbers say which, so far as one does.
      by_gate: whether its greatest numbers alone are kept, and always so many.
    """

    exact: bool
    keeps: int
    gate: int
    by_gate: bool


def selection(region: Region, sides: Sequence[Value]) -> Selection:
    """What a region selects that looks at all positions.

    Args:
      sides: those of its side inputs that are not made of numbers alone.

    Raises:
      NoMatch: it reads all positions, but selects no few of them.
    """
    last = max(region.selection, key=lambda node: node.index)
    tokens = region.window.tokens(region.value.shape)
    if not isinstance(tokens, int) or tokens == 0:
        reason = f"it selects among its hidden positions, and cannot be tried on {tokens} tokens"
        raise NoMatch(Refusal.UNSUPPORTED, reason, last)
    exact = any(has(node.primitive, Trait.ORDERS) for node in region.selection)
    trials = _Trials(region, sides, exact)
    every = range(len(region.projections))
    gates = [i for i in every if 2 * trials.kept([i]) <= region.size]
    most = trials.kept(every)
    if not 0 < 2 * most <= region.size:
        reason = "it reads all hidden positions, but selects no few of them"
        raise NoMatch(Refusal.MIXES_POSITIONS, reason, last)
    alone = exact and not _decides(region, sides)
    sole = [gate for gate in every if alone and trials.selects_by(gate, most)]
    return Selection(exact, most, (sole or gates or [0])[-1], bool(sole))


class _Trials:
    """Runs a region on random rows."""

    def __init__(self, region: Region, sides: Sequence[Value], exact: bool) -> None:
        self._region, self._sides, self._exact = region, sides, exact
        self._rng = np.random.default_rng(0)
        self._tokens = [item.window.tokens(item.linear.out.shape) for item in region.projections]

    def kept(self, varied: Sequence[int]) -> int:
        """Positions that are not zero for any token, where some projections vary and the others are
        one. All tokens have the same row, so that the count does not depend on how many there are.
        """
        size = self._region.size
        drawn = np.random.default_rng(0).normal(size=(len(self._tokens), size))
        if self._exact:  # what is equal to a threshold is kept, too: no two are
            dtypes = [item.linear.out.dtype for item in self._region.projections]
            drawn = np.stack(list(map(_distinct, drawn, dtypes)))
        rows = [row if i in varied else np.ones(size) for i, row in enumerate(drawn)]
        zeros = [jnp.zeros(size, vector.value.dtype) for vector in self._region.vectors]
        ones = {side: jnp.ones(side.shape, side.dtype) for side in self._sides}
        return int(self._run(rows, zeros, ones).any(0).sum())

    def selects_by(self, gate: int, most: int) -> bool:
        """Whether the greatest numbers of a gate alone are kept, token by token and whatever else
        there is; where none is positive, perhaps fewer."""
        tokens, dtype = self._tokens[gate], self._region.projections[gate].linear.out.dtype
        cases = list(self._cases(dtype, most))
        self._rng.shuffle(cases)  # so that tokens beside each other differ
        for start in range(0, len(cases), tokens):
            rows, whole = map(np.stack, zip(*cases[start : start + tokens], strict=True))
            if not self._are_kept(gate, most, rows, whole):
                return False
        return True

    def _are_kept(self, gate: int, most: int, rows: np.ndarray, whole: np.ndarray) -> bool:
        """Whether of these gates, [n, size], which tokens have in turn, the greatest alone are
        kept, and all of them where `whole` says so."""
        region, rng = self._region, self._rng
        greatest = np.zeros(rows.shape, bool)
        np.put_along_axis(greatest, np.argsort(-rows, -1)[:, :most], True, -1)
        # In few bits, too, they are apart from the others: by little or by much.
        apart = np.where(np.arange(len(rows)) % 2, 1.0, 2.0**-5)[:, None]
        threshold = np.where(greatest, rows, np.inf).min(-1, keepdims=True)
        rows = rows - ~greatest * apart * np.abs(threshold)
        others = rng.normal(size=(len(self._tokens), region.size))
        pre = [rows if i == gate else row for i, row in enumerate(others)]
        vectors = [jnp.asarray(rng.normal(size=region.size), v.value.dtype) for v in region.vectors]
        found = self._run(pre, vectors, {side: _drawn(side, rng) for side in self._sides})
        if len(found) != self._tokens[gate]:
            return False
        turn = np.arange(len(found)) % len(rows)
        return not (found & ~greatest[turn]).any() and bool(
            (found.sum(-1) == most)[whole[turn]].all()
        )

    def _cases(self, dtype: Any, most: int) -> Iterable[tuple[np.ndarray, bool]]:
        """Rows, and whether so many of each are positive."""
        size, rng = self._region.size, self._rng
        few = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).maxexp < 100
        groups = np.zeros(size)
        groups[: min(2 * most, size)] = 1
        for power in _POWERS:
            normal = rng.normal(size=(5, size))
            shapes = {
                "normal": (normal[0], True),
                "heavy tails": (normal[1] ** 3, True),
                "all positive": (np.abs(normal[2]) + 4, True),
                "two groups": (rng.permutation(groups) + normal[3] / 100, True),
                "none positive": (-np.abs(normal[4]), False),
            }
            for row, whole in shapes.values():
                yield row * 2.0 ** (power // 8 if few else power), whole

    def _run(
        self,
        rows: Sequence[Any],
        vectors: Sequence[Any],
        sides: Mapping[Value, Any],
    ) -> np.ndarray:
        """bool[tokens, size], the positions that are not zero; of rows [size] or [n, size], of
        which tokens have one each in turn."""
        pre = [
            jnp.asarray(some, item.linear.out.dtype)[np.arange(tokens) % len(some)]
            for some, item, tokens in zip(
                map(np.atleast_2d, rows), self._region.projections, self._tokens, strict=True
            )
        ]
        found = np.asarray(self._region.run(pre, vectors, sides) != 0)
        return found.reshape(-1, self._region.size)


def _distinct(row: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers in the order of a row's, no two of which are equal in a type, but for very few bits.

    Half of them are negative.
    """
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).eps < 1e-5:
        return row
    bits, half = int(jnp.finfo(dtype).nmant), -(-len(row) // 2)
    each = np.arange(half) - half // 2  # of the positive numbers of the type, 1 being number 0
    positive = 2.0 ** (each >> bits) * (1 + (each & (1 << bits) - 1) / (1 << bits))
    values = np.concatenate([-positive[::-1], positive])[-len(row) :]
    return values[np.argsort(np.argsort(row))]


def _drawn(side: Value, rng: np.random.Generator) -> Any:
    """Numbers for a side input, none of which is zero."""
    if jnp.issubdtype(side.dtype, jnp.inexact):
        return jnp.asarray(rng.normal(size=side.shape), side.dtype)
    return jnp.asarray(rng.integers(1, 4, size=side.shape), side.dtype)


def _decides(region: Region, sides: Sequence[Value]) -> bool:
    """Whether one of these reaches what says which positions are kept: what the region sorts, sums
    up or compares, a condition, or a place."""
    ends = {item.linear.out for item in region.projections}
    ends |= {vector.value for vector in region.vectors}
    todo = [
        value
        for node in region.nodes
        if not ends.intersection(node.outs)
        for value in _deciding(node, node in region.selection)
    ]
    given, seen = set(sides), set[Value]()
    while todo:
        value = todo.pop()
        if value in given:
            return True
        if value in seen or value in ends or value.node is None:
            continue
        seen.add(value)
        todo += value.node.ins
    return False


def _deciding(node: Node, selects: bool) -> Sequence[Value]:
    """The operands of a node that say which positions are kept."""
    if selects or has(node.primitive, Trait.COMPARES):
        return node.ins
    if node.primitive is p.select_n_p:
        return node.ins[:1]
    if has(node.primitive, Trait.POINTWISE | Trait.KEEPS | Trait.MOVES):
        return ()
    return node.ins[1:] if has(node.primitive, Trait.CUTS) else node.ins
