"""FFN blocks: linear, something separate for each hidden position, linear."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Mapping

from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.provenance import Provenance
from hire_rewrite.patterns.grow import grow, mixes_tokens
from hire_rewrite.patterns.linear import Linear, wide_axes
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.region import Region
from hire_rewrite.patterns.window import Window
from hire_rewrite.sites.ffn.activation import Activation, classify

_ACTIVATIONS = frozenset({p.max_p, p.tanh_p, p.logistic_p, p.erf_p, p.erfc_p, p.exp_p})

__all__ = ["FFNMatch", "match_ffn"]


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
class FFNMatch:
    """`down(region(up(x), ...))`: the projections are in the region, in the order traced.

    Attributes:
      piece: what of the input of `down` the region is.
      experts: blocks of these sizes that lie side by side (mixture of experts), mostly one.
      unsupported: why it cannot be rewritten, if it cannot.
    """

    region: Region
    down: Linear
    piece: Piece
    activation: Activation
    experts: int
    unsupported: str | None

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
        """What the block reads besides its weights."""
        return (self.x, *self.region.sides, *(value for value, _ in self.piece.others))

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.down.out,)

    @property
    def weights(self) -> tuple[Value, ...]:
        """Its matrices and vectors."""
        vectors = (vector.value for region in self.regions for vector in region.vectors)
        return (*(linear.weight for linear in self.linears), *vectors)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer of the block once, `down` last."""
        ups = dict.fromkeys(projection.linear for projection in self.region.projections)
        return (*ups, self.down)


def match_ffn(
    down: Linear,
    linears: Mapping[Node, Linear],
    provenance: Provenance,
    uses: Uses,
    activations: dict[Hashable, Activation],
) -> FFNMatch:
    """The FFN block that ends in `down`.

    Args:
      activations: of regions that were seen before, by signature; layers are mostly alike.

    Raises:
      Miss: `down` does not end one.
    """
    furthest: Miss | None = None
    for axis in wide_axes(down.x.shape, down.x_axes) or down.x_axes[:1]:
        for piece in _pieces(down, axis, uses):
            try:
                return _match_piece(piece, down, linears, provenance, uses, activations)
            except Miss as miss:
                if furthest is None or miss.matched > furthest.matched:
                    furthest = miss
    assert furthest is not None
    raise furthest


def _pieces(down: Linear, axis: int, uses: Uses) -> list[Piece]:
    """The whole input, or what it is joined of (attention's output beside the hidden neurons)."""
    node = down.x.node
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


def _match_piece(
    piece: Piece,
    down: Linear,
    linears: Mapping[Node, Linear],
    provenance: Provenance,
    uses: Uses,
    activations: dict[Hashable, Activation],
) -> FFNMatch:
    axis, end = piece.axis, piece.joint or down.node
    window = Window(axis, piece.value.shape[axis])
    region = grow(piece.value, window, end, linears, provenance, uses)
    matched = len(region.nodes) + 1
    if not region.projections:
        raise Miss("no linear layer leads to it", down.node, matched)
    first = region.projections[0].linear
    if region.ranged and not any(node.primitive is p.round_p for node in region.nodes):
        raise Miss("its input is also read by abs", down.node, matched)
    if not first.tokens:
        raise Miss("there are no tokens", down.node, matched)
    for projection in (item for part in (region, *region.siblings) for item in part.projections):
        linear = projection.linear
        if not (_same(linear.x, first.x) and linear.x_axes == first.x_axes):
            raise Miss(_different_inputs(linear, first), linear.node, matched)
        if not _same_product(linear.node, first.node):
            raise Miss("its projections differ in dtype or precision", linear.node, matched)
    cut = {sibling.value for sibling in region.siblings}
    if any(value in cut or value.node in region.nodes for value, _ in piece.others):
        raise Miss("its hidden positions are cut to pieces and joined anew", end, matched)
    activation = activations.get(region.signature)
    if activation is None:
        try:
            activation = classify(region)
        except (NotImplementedError, TypeError, ValueError) as error:
            reason = f"its code does not run by itself: {(str(error).splitlines() or [''])[0]}"
            raise Miss(reason, end, matched) from error
        activations[region.signature] = activation
    if activation.name == "linear":
        raise Miss("nothing non-linear stands between (a low-rank product)", down.node, matched)
    experts = {item.linear.experts(item.window) for item in region.projections}
    side_by_side = max(experts)
    d_out = down.out_dim
    if side_by_side > 1 and any(down.weight.shape[a] == side_by_side for a, _ in down.free):
        d_out //= side_by_side  # every expert, of which some are chosen afterwards
        experts.add(side_by_side)
    else:
        experts.add(down.experts() * down.in_dim // down.x.shape[axis])
    if len(experts) > 1:
        raise Miss(
            f"its products have different numbers of experts: {sorted(experts)}",
            down.node,
            matched,
        )
    count = experts.pop()
    if region.reordered is not None and count == 1:
        raise Miss(mixes_tokens(region.reordered), region.reordered, matched)
    no_block = _no_block(region, first, down, d_out, count, uses)
    if no_block is not None:
        raise Miss(no_block, down.node, matched)
    return FFNMatch(
        region, down, piece, activation, count, _unsupported(region, down, piece, count)
    )


def _no_block(
    region: Region, first: Linear, down: Linear, d_out: int, experts: int, uses: Uses
) -> str | None:
    """Why two layers in a row are no feed-forward block.

    A block returns to the size of its input, and what is not gated goes through more neurons than
    that. Classifiers, encoders and decoders, poolers, squeeze-and-excitation and adapters do not.
    (A gated block may read two inputs side by side, as where tokens are shifted.)
    """
    d_in, width = first.in_dim, region.size
    gated = len(region.projections) > 1
    if d_in != d_out and not (gated and d_in == 2 * d_out):
        return f"two layers in a row, {d_in} → {width} → {d_out}: no block that returns to its size"
    if gated or experts > 1 or width > d_in:
        return None
    if width < d_in:
        return f"a bottleneck, {d_in} → {width} → {d_out}: there is nothing to be saved"
    if _goes_on(down, uses):
        return f"one of several layers in a row, {d_in} → {width} → {d_out}: no block of its own"
    return None


def _goes_on(down: Linear, uses: Uses) -> bool:
    """Whether nothing but another activation reads the result (and its bias)."""
    stack = [down.out]
    while stack:
        for user, _ in uses.users(stack.pop()):
            if user.primitive in _ACTIVATIONS:
                return True
            if user.primitive in (p.add_p, p.convert_element_type_p, p.reshape_p):
                others = [v for v in user.ins if v.shape == user.outs[0].shape]
                if len(others) == 1 or _is_bias(user):
                    stack += user.outs
    return False


def _is_bias(node: Node) -> bool:
    made = (v.node for v in node.ins)
    return any(n is not None and n.primitive is p.broadcast_in_dim_p for n in made)


def _unsupported(region: Region, down: Linear, piece: Piece, experts: int) -> str | None:
    """Why a block cannot be rewritten."""
    ups = [(item.linear, item.linear.expert_axes(item.window)) for item in region.projections]
    if any(linear.grouped is not None for linear, _ in ups):
        return f"which of its {experts} experts a token takes is known at run time (ragged_dot)"
    if experts > 1:
        if any(axes is None for _, axes in ups) or down.expert_axes() is None:
            return f"what its {experts} experts compute is summed up or chosen from in its products"
        if region.reordered is not None:
            return f"the tokens of its {experts} experts are put into another order"
        if region.vectors or region.siblings or region.selection or piece.joint is not None:
            return f"its {experts} experts have biases, a top-k or a product in common with others"
    if region.ranged:
        return "its neurons are rounded to the range of the greatest of all (dynamic quantization)"
    if not all(vector.is_flat for part in (region, *region.siblings) for vector in part.vectors):
        return "a weight of it differs from token to token"
    return None


def _different_inputs(linear: Linear, first: Linear) -> str:
    rank, full = sorted((linear.in_dim, first.in_dim))
    if 2 * rank <= full:
        return f"a low-rank product of rank {rank} (LoRA) is added to it: merge it into the weight"
    return "its projections read different inputs"


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
