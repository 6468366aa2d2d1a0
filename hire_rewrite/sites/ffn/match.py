"""FFN blocks: linear, something separate for each hidden position, linear."""

from __future__ import annotations

import dataclasses
import itertools

from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import Window
from hire_rewrite.patterns.linear import Linear, MatchContext
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from hire_rewrite.patterns.region import Region
from hire_rewrite.patterns.slice import backward_slice
from hire_rewrite.sites.ffn.activation import Activation, classify
from hire_rewrite.sites.kind import Match


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A part of what the last layer of a block contracts: positions from `start` of `axis`.

    `joint` is the node that joins it with `others` (values and where each starts), if any.
    """

    value: Value
    axis: int
    start: int = 0
    joint: Node | None = None
    others: tuple[tuple[Value, int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class FFNMatch(Match):
    """A block `down(region(up(x), ...))`; the projections are in the region, in the order traced.

    Attributes:
      piece: what of the input of `down` the region is.
      experts: blocks of these sizes that lie side by side (mixture of experts), mostly one.
    """

    region: Region
    down: Linear
    piece: Piece
    activation: Activation
    experts: int

    @property
    def x(self) -> Value:
        return self.region.projections[0].linear.x

    @property
    def x_axes(self) -> tuple[int, ...]:
        return self.region.projections[0].linear.x_axes

    @property
    def nodes(self) -> frozenset[Node]:
        """The nodes that it replaces; those of a fused product that others read are not its own."""
        return (self.region.nodes - self.shared) | set(self.tail)

    @property
    def shared(self) -> frozenset[Node]:
        """The nodes that make the other parts of a fused product."""
        return frozenset(node for sibling in self.region.siblings for node in sibling.nodes)

    @property
    def tail(self) -> tuple[Node, ...]:
        """The nodes behind the region, `down` last."""
        joint = (self.piece.joint,) if self.piece.joint is not None else ()
        return (*joint, self.down.node)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The block's own and those of the other parts of a fused product."""
        return (self.region, *self.region.siblings)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x, *self.region.sides, *(value for value, _ in self.piece.others))

    @property
    def weights(self) -> tuple[Value, ...]:
        vectors = (vector.source.value for region in self.regions for vector in region.vectors)
        return (*super().weights, *vectors)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer of the block once, `down` last."""
        ups = dict.fromkeys(projection.linear for projection in self.region.projections)
        return (*ups, self.down)


def match_ffn(down: Linear, context: MatchContext) -> FFNMatch:
    """The FFN block that ends in `down`.

    Raises:
      NoMatch: `down` does not end one.
    """
    furthest: NoMatch | None = None
    for axis in _wide_axes(down):
        for piece in _pieces(down, axis, context):
            try:
                return _match_piece(piece, down, context)
            except NoMatch as miss:
                if furthest is None or miss.matched > furthest.matched:
                    furthest = miss
    assert furthest is not None
    raise furthest


def _wide_axes(down: Linear) -> list[int]:
    """The contracted axes with more than one position, the longest first; one of them at least."""
    shape = down.x.shape
    wide = sorted((i for i in down.x_axes if shape[i] > 1), key=lambda i: -shape[i])
    return wide or list(down.x_axes[:1])


def _pieces(down: Linear, axis: int, context: MatchContext) -> list[Piece]:
    """The whole input, or what it is joined of (attention's output beside the hidden neurons)."""
    node, uses = down.x.node, context.uses
    if (
        node is None
        or node.primitive is not p.concatenate_p
        or node.params["dimension"] != axis
        or [user for user, _ in uses.users(down.x)] != [down.node]
        or down.x in uses.results
    ):
        return [Piece(down.x, axis)]
    starts = itertools.accumulate((value.shape[axis] for value in node.ins), initial=0)
    placed = list(zip(node.ins, starts, strict=False))
    return [
        Piece(value, axis, start, node, tuple(other for other in placed if other[1] != start))
        for value, start in placed
    ]


def _match_piece(piece: Piece, down: Linear, context: MatchContext) -> FFNMatch:
    end = piece.joint or down.node
    window = Window(piece.axis, piece.value.shape[piece.axis])
    region = backward_slice(piece.value, window, end, context)
    matched = len(region.nodes) + 1

    def refused(refusal: Refusal, reason: str, node: Node = down.node) -> NoMatch:
        return NoMatch(refusal, reason, node, matched)

    if not region.projections:
        raise refused(Refusal.FROM_OUTSIDE, "no linear layer leads to it")
    first = region.projections[0].linear
    for projection in (item for part in (region, *region.siblings) for item in part.projections):
        linear = projection.linear
        if not (_same(linear.x, first.x) and linear.x_axes == first.x_axes):
            raise refused(*_different_inputs(linear, first), linear.node)
        if not _same_product(linear.node, first.node):
            reason = "its projections differ in dtype or precision"
            raise refused(Refusal.DIFFERENT_PRODUCTS, reason, linear.node)
    cut = {sibling.value for sibling in region.siblings}
    if any(value in cut or value.node in region.nodes for value, _ in piece.others):
        reason = "its hidden positions are cut to pieces and joined anew"
        raise refused(Refusal.MIXES_POSITIONS, reason, end)
    activation = context.cache.get(region.signature)
    if activation is None:
        try:
            activation = classify(region)
        except (NotImplementedError, TypeError, ValueError) as error:
            reason = f"its code does not run by itself: {(str(error).splitlines() or [''])[0]}"
            raise refused(Refusal.UNKNOWN_OPERATION, reason, end) from error
        context.cache[region.signature] = activation
    if activation.name == "linear":
        reason = "nothing non-linear stands between (a low-rank product)"
        raise refused(Refusal.LOW_RANK, reason)
    experts, d_out = _experts(region, down, piece)
    if len(experts) > 1:
        reason = f"its products have different numbers of experts: {sorted(experts)}"
        raise refused(Refusal.DIFFERENT_PRODUCTS, reason)
    count = experts.pop()
    not_a_block = _not_a_block(region, first.in_dim, d_out, down, count, context)
    if not_a_block is not None:
        raise refused(Refusal.NOT_A_BLOCK, not_a_block)
    unsupported = _unsupported(region, down, piece, count)
    if unsupported is not None:
        raise refused(Refusal.UNSUPPORTED, unsupported)
    return FFNMatch(region, down, piece, activation, count)


def _experts(region: Region, down: Linear, piece: Piece) -> tuple[set[int], int]:
    """How many experts each product has, and the width of what one of them returns."""
    experts = {item.linear.experts(item.window) for item in region.projections}
    most = max(experts)
    if most > 1 and any(down.weight.shape[axis] == most for axis, _ in down.free):
        # Every expert returns something, of which some is chosen afterwards.
        return experts | {most}, down.out_dim // most
    last = down.experts() * down.in_dim // down.x.shape[piece.axis]
    return experts | {last}, down.out_dim


def _unsupported(region: Region, down: Linear, piece: Piece, experts: int) -> str | None:
    """Why a block of this form is not rewritten."""
    if experts > 1:
        ups = [item.linear.expert_axes(item.window) for item in region.projections]
        if None in ups or down.expert_axes() is None:
            return f"what its {experts} experts compute is summed up or chosen from in its products"
        if region.vectors or region.siblings or region.selection or piece.joint is not None:
            return f"its {experts} experts have biases, a top-k or a product in common with others"
    if not all(vector.is_flat for part in (region, *region.siblings) for vector in part.vectors):
        return "a weight of it differs from token to token"
    return None


def _not_a_block(
    region: Region, d_in: int, d_out: int, down: Linear, experts: int, context: MatchContext
) -> str | None:
    """Why two layers in a row are not a feed-forward block.

    A block returns to the size of its input, and what is not gated goes through more neurons than
    that. Classifiers, encoders and decoders, poolers, squeeze-and-excitation and adapters do not.
    (A gated block may read two inputs side by side, as where tokens are shifted.)
    """
    sizes = f"{d_in} → {region.size} → {d_out}"
    gated = len(region.projections) > 1
    if d_in != d_out and not (gated and d_in == 2 * d_out):
        return f"two layers in a row, {sizes}: not a block that returns to its size"
    if gated or experts > 1 or region.size > d_in:
        return None
    if region.size < d_in:
        return f"a bottleneck, {sizes}: there is nothing to be saved"
    if _goes_on(down, context):
        return f"one of several layers in a row, {sizes}: not a block of its own"
    return None


def _goes_on(down: Linear, context: MatchContext) -> bool:
    """Whether nothing but another activation reads the result (and its bias)."""
    stack = [down.out]
    while stack:
        for user, _ in context.uses.users(stack.pop()):
            if has(user.primitive, Trait.BENDS):
                return True
            if has(user.primitive, Trait.ADDS | Trait.CASTS):
                makers = [v.node.primitive for v in user.ins if v.node is not None]
                others = [v for v in user.ins if v.shape == user.outs[0].shape]
                if len(others) == 1 or p.broadcast_in_dim_p in makers:
                    stack += user.outs
    return False


def _different_inputs(linear: Linear, first: Linear) -> tuple[Refusal, str]:
    rank, full = sorted((linear.in_dim, first.in_dim))
    if 2 * rank <= full:
        what = f"a low-rank product of rank {rank} (LoRA) is added to it"
        return Refusal.LOW_RANK, f"{what}: merge it into the weight"
    return Refusal.DIFFERENT_PRODUCTS, "its projections read different inputs"


def _same(a: Value, b: Value) -> bool:
    """Whether two values are equal because they are computed alike (a norm written twice)."""
    seen, stack = {(a, b)}, [(a, b)]
    while stack:
        a, b = stack.pop()
        if a is b or (a.const is not None and a.const is b.const):
            continue
        if a.literal is not None and b.literal is not None:
            if a.dtype != b.dtype or not bool(a.literal == b.literal):
                return False
            continue
        if a.node is None or b.node is None or a.node.primitive is not b.node.primitive:
            return False
        if a.node.bodies or a.node.eqn.effects or len(a.node.outs) != 1:
            return False
        if a.node.params != b.node.params:
            return False
        pairs = set(zip(a.node.ins, b.node.ins, strict=True)) - seen
        seen |= pairs
        stack += pairs
    return True


def _same_product(a: Node, b: Node) -> bool:
    names = ("precision", "preferred_element_type")
    same = all(a.params.get(name) == b.params.get(name) for name in names)
    return same and a.outs[0].dtype == b.outs[0].dtype
