"""FFN blocks: linear, something separate for each hidden position, linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hire_rewrite.patterns.activation import Activation, classify
from hire_rewrite.patterns.graph import Node, Value
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.provenance import Provenance
from hire_rewrite.patterns.region import Region, Uses, grow

__all__ = ["FFNMatch", "match_ffn"]


@dataclasses.dataclass(frozen=True, eq=False)
class FFNMatch:
    """`down(region(up(x), ...))`: the projections are in the region, in the order traced."""

    region: Region
    down: Linear
    activation: Activation

    @property
    def x(self) -> Value:
        return self.region.projections[0].linear.x

    @property
    def x_axis(self) -> int:
        return self.region.projections[0].linear.x_axis

    @property
    def nodes(self) -> frozenset[Node]:
        return self.region.nodes | {self.down.node}

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What the block reads besides its weights."""
        return (self.x, *self.region.sides)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.down.out,)

    @property
    def weights(self) -> tuple[Value, ...]:
        """Its matrices and vectors."""
        vectors = (vector.value for vector in self.region.vectors)
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
) -> FFNMatch:
    """The FFN block that ends in `down`.

    Raises:
      Miss: `down` does not end one.
    """
    region = grow(down.x, down.x_axis, down.node, linears, provenance, uses)
    matched = len(region.nodes) + 1
    if not region.projections:
        raise Miss("no linear layer leads to it", down.node, matched)
    first = region.projections[0].linear
    for projection in region.projections:
        linear = projection.linear
        if not (_same(linear.x, first.x) and linear.x_axis == first.x_axis):
            raise Miss("its projections read different inputs", linear.node, matched)
        if not _same_product(linear.node, first.node):
            raise Miss("its projections differ in dtype or precision", linear.node, matched)
    activation = classify(region)
    if activation.name == "linear":
        raise Miss("nothing non-linear stands between (a low-rank product)", down.node, matched)
    return FFNMatch(region, down, activation)


def _same(a: Value, b: Value, known: dict[tuple[Value, Value], bool] | None = None) -> bool:
    """Whether two values are equal because they are computed alike (a norm written twice)."""
    known = {} if known is None else known
    if a is b or (a.const is not None and a.const is b.const):
        return True
    if a.literal is not None and b.literal is not None:
        return a.dtype == b.dtype and bool(a.literal == b.literal)
    if a.node is None or b.node is None or a.node.primitive is not b.node.primitive:
        return False
    if a.node.bodies or a.node.eqn.effects or len(a.node.outs) != 1:
        return False
    if (a, b) not in known:
        known[a, b] = a.node.params == b.node.params and all(
            _same(v, w, known) for v, w in zip(a.node.ins, b.node.ins, strict=True)
        )
    return known[a, b]


def _same_product(a: Node, b: Node) -> bool:
    names = ("precision", "preferred_element_type")
    same = all(a.params.get(name) == b.params.get(name) for name in names)
    return same and a.outs[0].dtype == b.outs[0].dtype
