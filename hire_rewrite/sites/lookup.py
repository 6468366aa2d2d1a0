"""Rows of a weight that are looked up elsewhere: an embedding that is tied to a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend.core import primitives as p
from jax.lax import GatherScatterMode

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.patterns.linear import Linear, MatchContext
from hire_rewrite.sites.kind import MatchedSite
from hire_rewrite.sites.replacement import SiteReplacement


def lookups_of(linear: Linear, context: MatchContext) -> tuple[Node, ...]:
    """The gathers of whole rows of a layer's weight, of those that no site has."""
    rows = _rows_of(linear)
    if rows is None:
        return ()
    users = context.uses.users(rows)
    return tuple(n for n, i in users if i == 0 and _takes_rows(n) and n not in context.taken)


def lookup_replacements(
    site: MatchedSite,
    lookups: Sequence[Node],
    arrays: Any,
    decode: Callable[[Any, Any, Array], Array],
) -> list[SiteReplacement]:
    """What takes the place of lookups of rows.

    Args:
      arrays: the packed arrays of the site.
      decode: (packed arrays, layer, numbers of rows: i32[...]) to the rows, f32[..., d].
    """

    def replacement(node: Node) -> SiteReplacement:
        def run(ins: Sequence[Any], layer: Any, state: Any) -> Any:
            return [looked_up(node, ins[0], lambda places: decode(state, layer, places))], None

        where = frozenset({node}), (node.ins[1],), tuple(node.outs)
        return SiteReplacement(site.name, *where, run, arrays, site.sharding.region, site.loops)

    return [replacement(node) for node in lookups]


def looked_up(node: Node, places: Array, decode: Callable[[Array], Array]) -> Array:
    """What a lookup returns.

    Args:
      places: its operand of numbers of rows, i32[..., 1].
      decode: numbers of rows, i32[...], to the rows, f32[..., d].
    """
    count, mode = node.ins[0].shape[0], node.params["mode"]
    places = places[..., 0]
    inside = (places >= 0) & (places < count)
    # As XLA does, also where it is promised that none is outside.
    places = jnp.clip(places, 0, count - 1)
    rows = decode(places).astype(node.outs[0].dtype)
    if mode == GatherScatterMode.FILL_OR_DROP:
        fill = node.params["fill_value"]
        rows = jnp.where(inside[..., None], rows, jnp.nan if fill is None else fill)
    return rows


def _rows_of(linear: Linear) -> Value | None:
    """The value [n, d] of which the layer's weight is a view."""
    weight = linear.weight
    if len(weight.shape) != 2 or len(linear.weight_in) != 1:
        return None
    (axis,) = linear.weight_in
    while weight.node is not None and weight.node.primitive is p.transpose_p:
        if tuple(weight.node.params["permutation"]) == (1, 0):
            axis = 1 - axis
        weight = weight.node.ins[0]
    return weight if axis == 1 else None


def _takes_rows(node: Node) -> bool:
    if node.primitive is not p.gather_p or node.ins[1].is_constant:
        return False
    numbers, rows = node.params["dimension_numbers"], node.ins[0].shape
    result: Any = node.outs[0]
    return (
        tuple(node.params["slice_sizes"]) == (1, rows[1])
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.offset_dims) == (len(result.shape) - 1,)
        and not numbers.operand_batching_dims
    )
