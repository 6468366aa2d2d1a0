"""The backward slice of a value: all code between it and the linear layers that it comes from.

Starting from a value and one of its axes (the *hidden* axis), `backward_slice` goes back through
operations that act separately on each position of that axis, until it arrives at linear layers
whose output is that axis. A use of what it passes that leads elsewhere stops it, unless it only
selects positions (a top-k) or cuts another part out of a fused product.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection
from typing import Any

from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Value, source_of
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import (
    Blocked,
    Window,
    has_axis_rule,
    keeps_tokens,
    operand_windows,
    ordered_axis,
)
from hire_rewrite.patterns.layout import fixed_starts
from hire_rewrite.patterns.linear import MatchContext, is_one_hot, product_with_argument
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from hire_rewrite.patterns.region import Projection, Region, Vector

_FAR = 64
"""Nodes that a selection may have."""


def backward_slice(value: Value, window: Window, end: Node, context: MatchContext) -> Region:
    """The region that computes `value` in `window` and is read by `end` alone.

    Raises:
      NoMatch: the hidden axis is mixed, comes from elsewhere, or is read by others as well.
    """
    walk = _Walk(end, context)
    region = walk.region(value, window)
    siblings = tuple(
        _Walk(end, context, within=walk.nodes).region(part, cut)
        for part, cut in walk.siblings.items()
    )
    return dataclasses.replace(region, siblings=siblings)


class _Walk:
    """Backward from a value to the linear layers that it comes from.

    Nodes are visited from the last to the first, so that all uses of a node's results have been
    seen when it is visited: a use outside the region stops the walk at once, and a walk costs no
    more than the region is large.

    Args:
      end: what reads the value.
      within: nodes that are known to belong to the region; then uses are not looked at.
    """

    def __init__(
        self, end: Node, context: MatchContext, within: Collection[Node] | None = None
    ) -> None:
        self.context, self.within = context, within
        self.nodes: set[Node] = {end}
        self.siblings: dict[Value, Window] = {}
        self._end = end
        self._reader = end
        self._selection: dict[Node, None] = {}
        self._windows: dict[Value, dict[Window, None]] = {}
        self._projections: list[Projection] = []
        self._vectors: list[Vector] = []
        self._sides: dict[Value, None] = {}
        self._queue: list[tuple[int, Node]] = []
        self._queued: set[Node] = set()

    def region(self, value: Value, window: Window) -> Region:
        """The region of a window of a value."""
        self._track(value, window)
        while self._queue:
            self._visit(heapq.heappop(self._queue)[1])
        self._check_selection()
        # Weights that were only passed on the way to a vector stay with the code that makes them.
        kept = {node for node in self.nodes if not self._is_weight(node)}
        read = dict.fromkeys(v for node in self._selection for v in node.ins if v.literal is None)
        known = {vector.value for vector in self._vectors}
        sides = dict.fromkeys(
            v
            for v in (*self._sides, *read)
            if v.const is None and v.node not in kept and v not in known
        )
        return Region(
            value,
            window,
            tuple(sorted(self._projections, key=_traced_order)),
            tuple(self._vectors),
            tuple(sides),
            frozenset(kept - {self._end}),
            selection=frozenset(self._selection),
        )

    def _track(self, value: Value, window: Window) -> None:
        """The region reads a window of a value."""
        windows = self._windows.setdefault(value, {})
        if window in windows:
            return
        windows[window] = None
        if self.context.provenance.is_weight(value):
            vector = Vector(value, window)
            leads_on = value.node is not None and has_axis_rule(value.node.primitive)
            if (vector.is_flat and not _is_repeated(value, window)) or not leads_on:
                self._vectors.append(vector)
                return
        elif value.node is None:
            raise self._refuse(
                Refusal.FROM_OUTSIDE,
                "its input comes from outside: an argument, a constant or a loop's carry",
                self._reader,
            )
        assert value.node is not None
        if value.node not in self._queued:
            self._queued.add(value.node)
            heapq.heappush(self._queue, (-value.node.index, value.node))

    def _visit(self, node: Node) -> None:
        self._reader = node
        if not self._is_weight(node) and self.within is None:
            self._check_uses(node)
        self.nodes.add(node)
        for output, result in enumerate(node.outs):
            for window in tuple(self._windows.get(result, ())):
                self._pass(node, output, window)

    def _pass(self, node: Node, output: int, window: Window) -> None:
        """From a window of a result to those of the operands."""
        linear = self.context.linears.get(node)
        if linear is not None and window.axis in linear.out_axes:
            if any(linear.weight_axis(axis) is None for axis in window.picked):
                reason = "single tokens of its input are picked"
                raise self._refuse(Refusal.MIXES_TOKENS, reason, node)
            self._projections.append(Projection(linear, window))
            return
        if _makes_mask(node) and self.within is None:
            self._mask(node)
            return
        if not has_axis_rule(node.primitive):
            raise self._unknown(node)
        try:
            inners = operand_windows(node, window, output)
        except Blocked as blocked:
            reason = (
                product_with_argument(self.context, node, window.axis)
                or f"its input axis {blocked}"
            )
            raise self._refuse(Refusal.MIXES_POSITIONS, reason, node) from None
        for operand, inner in zip(node.ins, inners, strict=True):
            if operand.literal is not None:
                continue
            if inner.axis is None:
                self._sides[operand] = None
                continue
            free = self.context.provenance.is_weight(operand)
            if not (free or keeps_tokens(node, operand, inner, window, output)):
                reason = f"{node.primitive} picks, reorders or mixes tokens"
                raise self._refuse(Refusal.MIXES_TOKENS, reason, node)
            self._track(operand, inner)

    def _check_uses(self, node: Node) -> None:
        """Raise if a result of the node is read outside the region so far."""
        uses = self.context.uses
        for output, result in enumerate(node.outs):
            if result not in self._windows:
                self._sibling(node, output)
                continue
            if result in uses.results:
                reason = "its input is also a result of the function or of the loop around it"
                raise self._refuse(Refusal.READ_ELSEWHERE, reason, node)
            axes = {window.axis for window in self._windows[result]}
            for user, _ in uses.users(result):
                if user in self.nodes:
                    continue
                if _cut_axis(user) not in axes:
                    self._select(user)
                    continue
                self.nodes.add(user)
                for part in range(len(user.outs)):
                    self._sibling(user, part)

    def _sibling(self, node: Node, output: int) -> None:
        """A part of a fused product that is read elsewhere."""
        part = node.outs[output]
        if part in self.context.uses.results or self.context.uses.users(part):
            axis = _cut_axis(node)
            if axis is None:
                reason = f"its input is also read through {node.primitive}"
                raise self._refuse(Refusal.READ_ELSEWHERE, reason, node)
            self.siblings[part] = Window(axis, part.shape[axis])

    def _select(self, user: Node) -> None:
        """Take what a use leads to into the region, if all of it comes back (as a threshold)."""
        linears, uses = self.context.linears, self.context.uses
        taken, stack = {user}, [user]
        while stack:
            node = stack.pop()
            leaves = any(result in uses.results for result in node.outs)
            if leaves or node.bodies or node.eqn.effects or node in linears or len(taken) > _FAR:
                raise self._read_by(user)
            readers = {reader for result in node.outs for reader, _ in uses.users(result)}
            stack += readers - taken - self.nodes
            taken |= readers - self.nodes
        if self._end in taken:
            raise self._read_by(user)
        self.nodes |= taken
        self._selection.update(dict.fromkeys(_in_order(taken)))

    def _mask(self, node: Node) -> None:
        """Back from a mask, or from selected values, to the hidden axis that they were found on."""
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            if current.bodies or len(seen) > _FAR:
                raise self._unknown(node)
            self.nodes.add(current)
            self._selection[current] = None
            if has(current.primitive, Trait.ORDERS):
                hidden, axis = current.ins[0], ordered_axis(current)
                self._track(hidden, Window(axis, hidden.shape[axis]))
                continue
            is_weight = self.context.provenance.is_weight
            makers = {v.node for v in current.ins if v.node and not is_weight(v)}
            stack += _in_order(makers - seen - self.nodes)
            seen |= makers

    def _check_selection(self) -> None:
        """What looks at all positions may only decide which of them are kept.

        Raises:
          NoMatch: it changes their values too, as a normalization does.
        """
        uses = self.context.uses
        made = {result for node in self._selection for result in node.outs}
        for value in made:
            outside = {user for user, _ in uses.users(value)} - self.nodes
            if outside or value in uses.results:
                reason = "what selects hidden positions is also read elsewhere"
                raise self._refuse(Refusal.READ_ELSEWHERE, reason, self._end)
        for node in _in_order(self.nodes - self._selection.keys()):
            read = [i for i, value in enumerate(node.ins) if value in made]
            if not read or has(node.primitive, Trait.COMPARES):
                continue
            if all(_makes_mask(node.ins[i].node) for i in read):
                continue
            readers = {user.primitive for user, _ in uses.users(node.outs[0])}
            is_threshold = all(r is p.max_p or has(r, Trait.COMPARES) for r in readers)
            if node.primitive is p.sub_p and read == [1] and is_threshold:
                continue
            raise self._changed_by_all(node)

    def _changed_by_all(self, node: Node) -> NoMatch:
        looks = Trait.SCATTERS | Trait.ORDERS | Trait.REDUCES
        reducing = next((n for n in self._selection if has(n.primitive, looks)), None)
        if reducing is None:
            return self._read_by(next(iter(self._selection)))
        return self._refuse(
            Refusal.MIXES_POSITIONS,
            f"between its two layers stands a normalization over the hidden axis, or the like, at "
            f"{source_of(reducing)}: {node.primitive} changes each position by what "
            f"{reducing.primitive} finds in all of them",
            reducing,
        )

    def _read_by(self, user: Node) -> NoMatch:
        linear = self.context.linears.get(user)
        if linear is not None and 4 * linear.out_dim <= linear.in_dim:
            what = f"a product of rank {linear.out_dim} (LoRA: merge it into the weight; a router)"
            return self._refuse(Refusal.LOW_RANK, f"its input is also read by {what}", user)
        if user.primitive is p.abs_p and any(node.primitive is p.round_p for node in self.nodes):
            return self._refuse(
                Refusal.UNSUPPORTED,
                "its neurons are rounded to the range of the greatest of all (dynamic "
                "quantization)",
                user,
            )
        reason = f"its input is also read by {user.primitive}"
        return self._refuse(Refusal.READ_ELSEWHERE, reason, user)

    def _unknown(self, node: Node) -> NoMatch:
        reason = (
            f"{node.primitive} is not known to treat the positions of its input axis separately"
        )
        if node.primitive in _compat.exchanges:
            reason = (
                "its hidden positions are sent or added up between devices, and each device's part "
                "of a block is rewritten by itself"
            )
        if has(node.primitive, Trait.RANDOM):
            reason = (
                f"{node.primitive} draws random numbers for its hidden positions, as an active "
                "dropout does: trace the model for inference (deterministic=True, model.eval(), "
                "eqx.nn.inference_mode)"
            )
        return self._refuse(Refusal.UNKNOWN_OPERATION, reason, node)

    def _is_weight(self, node: Node) -> bool:
        return all(map(self.context.provenance.is_weight, node.outs))

    def _refuse(self, refusal: Refusal, reason: str, node: Node) -> NoMatch:
        return NoMatch(refusal, reason, node, len(self.nodes))


def _makes_mask(node: Node | None) -> bool:
    """Whether the result may say which positions are kept."""
    if node is None:
        return False
    if node.primitive in (p.reduce_sum_p, p.reduce_max_p):
        return is_one_hot(node.ins[0])
    return node.primitive is p.sort_p or has(node.primitive, Trait.SCATTERS)


def _in_order(nodes: Collection[Node]) -> list[Node]:
    """Nodes as they were traced: sets have another order in each process and at each trace."""
    return sorted(nodes, key=lambda node: node.index)


def _traced_order(projection: Projection) -> tuple[int, Any]:
    return projection.linear.node.index, (projection.window.start, projection.window.picks)


def _cut_axis(node: Node) -> int | None:
    """The axis along which a node only cuts its operand to pieces, if it does."""
    fixed = node.primitive is p.gather_p and fixed_starts(node) is not None
    if not (fixed or has(node.primitive, Trait.CUTS)):
        return None
    old, new = node.ins[0].shape, node.outs[0].shape
    axes = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    return axes[0] if len(axes) == 1 and len(old) == len(new) else None


def _is_repeated(value: Value, window: Window) -> bool:
    """Whether a weight is one number repeated."""
    node = value.node
    if node is None or node.primitive is not p.broadcast_in_dim_p:
        return False
    return operand_windows(node, window)[0].axis is None
