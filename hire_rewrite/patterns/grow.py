"""Find a region: walk from a value back to the linear layers that it comes from.

Starting from a value and one of its axes (the *hidden* axis), `grow` walks backward through
operations that act separately on each position of that axis, until it arrives at linear layers
whose output is that axis. A use of what it passes that leads elsewhere stops it, unless it only
selects positions (a top-k) or cuts another part out of a fused product.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Mapping
from typing import Any

from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.provenance import Provenance
from hire_rewrite.patterns.axes import Blocked, axis_rules, keeps_tokens
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.one_hot import is_one_hot
from hire_rewrite.patterns.region import Projection, Region, Vector
from hire_rewrite.patterns.window import Window

__all__ = ["TOP", "grow", "mixes_tokens"]

_MASKS = frozenset({p.scatter_p, p.scatter_add_p, p.sort_p})
"""Operations whose result may say which positions are kept."""

TOP = frozenset({p.top_k_p, p.approx_top_k_p, p.sort_p})
"""Operations that order positions."""

_ALONG = ("axis", "dimension", "reduction_dimension")
"""What the parameter is called that says along which axis."""

_COMPARISONS = frozenset({p.ge_p, p.gt_p, p.le_p, p.lt_p, p.eq_p, p.ne_p})

_REDUCTIONS = TOP | {p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.argmax_p}


def grow(
    value: Value,
    window: Window,
    end: Node,
    linears: Mapping[Node, Linear],
    provenance: Provenance,
    uses: Uses,
) -> Region:
    """The region that computes `value` in `window` and is read by `end` alone.

    Raises:
      Miss: the hidden axis is mixed, comes from elsewhere, or is read by others as well.
    """
    walk = _Walk(end, linears, provenance, uses)
    walk.track(value, window)
    walk.run()
    region = walk.region(value, window)
    siblings = []
    for sibling, cut in walk.siblings.items():
        inner = _Walk(end, linears, provenance, uses, within=walk.nodes)
        inner.track(sibling, cut)
        inner.run()
        siblings.append(inner.region(sibling, cut))
    return dataclasses.replace(region, siblings=tuple(siblings))


class _Walk:
    """Backward from a value to the linear layers that it comes from.

    Nodes are visited from the last to the first, so that all uses of a node's results have been
    seen when it is visited: a use outside the region stops the walk at once, and a walk costs no
    more than the region is large.

    Args:
      within: nodes that are known to belong to the region; then uses are not looked at.
    """

    def __init__(
        self,
        end: Node,
        linears: Mapping[Node, Linear],
        provenance: Provenance,
        uses: Uses,
        within: Collection[Node] | None = None,
    ) -> None:
        self.linears, self.provenance, self.uses, self.within = linears, provenance, uses, within
        self.nodes: set[Node] = {end}
        self.reader = end
        self.siblings: dict[Value, Window] = {}
        self.selection: dict[Node, None] = {}
        self.ranged = False
        self.reordered: Node | None = None
        end_linear = linears.get(end)
        # Experts take runs of tokens that were sorted for them, and put them back afterwards.
        self._ordered = end_linear is None or end_linear.grouped is None
        self._end = end
        self._windows: dict[Value, dict[Window, None]] = {}
        self._projections: list[Projection] = []
        self._vectors: list[Vector] = []
        self._sides: dict[Value, None] = {}
        self._queue: list[tuple[int, Node]] = []
        self._queued: set[Node] = set()

    def track(self, value: Value, window: Window) -> None:
        """The region reads a window of a value."""
        windows = self._windows.setdefault(value, {})
        if window in windows:
            return
        windows[window] = None
        if self.provenance.is_weight(value):
            vector = Vector(value, window)
            leads_on = value.node is not None and value.node.primitive in axis_rules
            if (vector.is_flat and not _is_repeated(value, window)) or not leads_on:
                self._vectors.append(vector)
                return
        elif value.node is None:
            raise self._miss(
                "its input comes from outside: an argument, a constant or a loop's carry",
                self.reader,
            )
        assert value.node is not None
        if value.node not in self._queued:
            self._queued.add(value.node)
            heapq.heappush(self._queue, (-value.node.index, value.node))

    def run(self) -> None:
        while self._queue:
            node = heapq.heappop(self._queue)[1]
            self.reader = node
            if not self._is_weight(node) and self.within is None:
                self._check_uses(node)
            self.nodes.add(node)
            for output, result in enumerate(node.outs):
                for window in tuple(self._windows.get(result, ())):
                    self._pass(node, output, window)

    def region(self, value: Value, window: Window) -> Region:
        # Weights that were only passed on the way to a vector stay with the code that makes them.
        kept = {node for node in self.nodes if not self._is_weight(node)}
        read = dict.fromkeys(v for node in self.selection for v in node.ins if v.literal is None)
        known = {vector.value for vector in self._vectors}
        sides = dict.fromkeys(
            v
            for v in (*self._sides, *read)
            if v.const is None and v.node not in kept and v not in known
        )
        self._check_selection()
        return Region(
            value,
            window,
            tuple(sorted(self._projections, key=_traced_order)),
            tuple(self._vectors),
            tuple(sides),
            frozenset(kept - {self._end}),
            reordered=self.reordered,
            ranged=self.ranged,
            selection=frozenset(self.selection),
        )

    def _pass(self, node: Node, output: int, window: Window) -> None:
        """From a window of a result to those of the operands."""
        linear = self.linears.get(node)
        if linear is not None and window.axis in linear.out_axes:
            if any(linear.weight_axis(axis) is None for axis in window.picked):
                raise self._miss("single tokens of its input are picked", node)
            self._projections.append(Projection(linear, window))
            return
        if _makes_mask(node) and self.within is None:
            self._mask(node)
            return
        rule = axis_rules.get(node.primitive)
        if rule is None:
            raise self._miss(_mixed_by(node), node)
        try:
            inners = rule.operands(node, window, output)
        except Blocked as blocked:
            raise self._miss(f"its input axis {blocked}", node) from None
        for operand, inner in zip(node.ins, inners, strict=True):
            if operand.literal is not None:
                continue
            if inner.axis is None:
                self._sides[operand] = None
                continue
            free = not self._ordered or self.provenance.is_weight(operand)
            if not (free or keeps_tokens(node, operand, inner, window, output)):
                if node.primitive is not p.transpose_p:
                    raise self._miss(mixes_tokens(node), node)
                self.reordered = node
            self.track(operand, inner)

    def _check_uses(self, node: Node) -> None:
        """Raise if a result of the node is read outside the region grown so far."""
        for output, result in enumerate(node.outs):
            if result not in self._windows:
                self._sibling(node, output)
                continue
            if result in self.uses.results:
                raise self._miss(
                    "its input is also a result of the function or of the loop around it", node
                )
            for user, _ in self.uses.users(result):
                if user in self.nodes:
                    continue
                axes = {window.axis for window in self._windows[result]}
                if not any(_cuts(user, axis) for axis in axes if axis is not None):
                    self._select(user)
                    continue
                self.nodes.add(user)
                for part in range(len(user.outs)):
                    self._sibling(user, part)

    def _sibling(self, node: Node, output: int) -> None:
        """A part of a fused product that is read elsewhere."""
        part = node.outs[output]
        if part in self.uses.results or self.uses.users(part):
            (axis,) = _cut_axes(node) or (None,)
            if axis is None:
                raise self._miss(f"its input is also read through {node.primitive}", node)
            self.siblings[part] = Window(axis, part.shape[axis])

    def _select(self, user: Node) -> None:
        """Take what a use leads to into the region, if all of it comes back (as a threshold)."""
        if user.primitive is p.abs_p:
            readers = {reader for reader, _ in self.uses.users(user.outs[0])}
            if all(reader.primitive is p.reduce_max_p for reader in readers):
                self.ranged = True
                self.nodes |= {user, *readers}
                return
        miss = self._miss(f"its input is also read by {self._reader(user)}", user)
        found, stack = {user}, [user]
        while stack:
            node = stack.pop()
            if node.bodies or node.eqn.effects or node in self.linears or len(found) > 64:
                raise miss
            for result in node.outs:
                if result in self.uses.results:
                    raise miss
                readers = {reader for reader, _ in self.uses.users(result)}
                stack += readers - found - self.nodes
                found |= readers - self.nodes
        if self._end in found or self.linears.keys() & found:
            raise miss
        self.nodes |= found
        self.selection.update(dict.fromkeys(sorted(found, key=lambda node: node.index)))

    def _mask(self, node: Node) -> None:
        """Back from a mask, or from selected values, to the hidden axis that they were found on."""
        stack, found = [node], {node}
        while stack:
            current = stack.pop()
            if current.bodies or len(found) > 64:
                raise self._miss(_mixed_by(node), node)
            self.nodes.add(current)
            self.selection[current] = None
            if current.primitive in TOP:
                hidden = current.ins[0]
                along = next((current.params[n] for n in _ALONG if n in current.params), -1)
                axis = along % len(hidden.shape)
                self.track(hidden, Window(axis, hidden.shape[axis]))
                continue
            makers = {v.node for v in current.ins if v.node and not self.provenance.is_weight(v)}
            stack += makers - found - self.nodes
            found |= makers

    def _check_selection(self) -> None:
        """What looks at all positions may only decide which of them are kept.

        Raises:
          Miss: it changes their values too, as a normalization does.
        """
        made = {result for node in self.selection for result in node.outs}
        for value in made:
            outside = {user for user, _ in self.uses.users(value)} - self.nodes
            if outside or value in self.uses.results:
                raise self._miss("what selects hidden positions is also read elsewhere", self._end)
        reduced = [n for n in self.selection if n.primitive in _MASKS | _REDUCTIONS]
        for node in self.nodes - self.selection.keys():
            read = [i for i, value in enumerate(node.ins) if value in made]
            masks = all(_makes_mask(node.ins[i].node) for i in read)
            if not read or node.primitive in _COMPARISONS or masks:
                continue
            kept = {user.primitive for user, _ in self.uses.users(node.outs[0])}
            if node.primitive is p.sub_p and read == [1] and kept <= {p.max_p, *_COMPARISONS}:
                continue
            raise self._miss(
                f"{node.primitive} changes each position by what {reduced[0].primitive} finds in "
                "all of them (a normalization, say)"
                if reduced
                else f"its input is also read by {next(iter(self.selection)).primitive}",
                reduced[0] if reduced else node,
            )

    def _reader(self, user: Node) -> str:
        linear = self.linears.get(user)
        if linear is not None and 4 * linear.out_dim <= linear.in_dim:
            return f"a product of rank {linear.out_dim} (LoRA: merge it into the weight; a router)"
        return str(user.primitive)

    def _is_weight(self, node: Node) -> bool:
        return all(map(self.provenance.is_weight, node.outs))

    def _miss(self, reason: str, node: Node) -> Miss:
        return Miss(reason, node, len(self.nodes))


def mixes_tokens(node: Node) -> str:
    """Why a node stops a walk whose tokens do not come out as they went in."""
    return f"{node.primitive} picks, reorders or mixes tokens"


def _makes_mask(node: Node | None) -> bool:
    """Whether the result may say which positions are kept."""
    if node is None or node.primitive in _MASKS:
        return node is not None
    return node.primitive in (p.reduce_sum_p, p.reduce_max_p) and is_one_hot(node.ins[0])


def _traced_order(projection: Projection) -> tuple[int, Any]:
    return projection.linear.node.index, (projection.window.start, projection.window.picks)


def _cut_axes(node: Node) -> tuple[int, ...]:
    """The axis along which a node only cuts its operand to pieces, if it does."""
    if node.primitive is _compat.split_p:
        return (node.params["axis"],)
    if node.primitive not in (p.slice_p, p.dynamic_slice_p):
        return ()
    old, new = node.ins[0].shape, node.outs[0].shape
    axes = tuple(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    return axes if len(axes) == 1 else ()


def _cuts(node: Node, axis: int) -> bool:
    return _cut_axes(node) == (axis,)


def _is_repeated(value: Value, window: Window) -> bool:
    """Whether a weight is one number repeated."""
    node = value.node
    if node is None or node.primitive is not p.broadcast_in_dim_p:
        return False
    return axis_rules[node.primitive].operands(node, window)[0].axis is None


def _mixed_by(node: Node) -> str:
    if node.primitive is p.dot_general_p:
        return "its input comes from a product that is not linear in a weight along that axis"
    return f"{node.primitive} is not known to treat the positions of its input axis separately"
