"""The products of a block: of all neurons, of those that are fetched, of parts that it shares."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.block import FFNSpec, FFNState, PartState


def all_products(x: Array, state: FFNState, layer: Array | int, spec: FFNSpec) -> tuple[Array, ...]:
    """For each projection the products of all neurons, [tokens, f]."""
    rows = lax.dynamic_index_in_dim(state.up, layer, keepdims=False)
    return _by_projection(_up_product(x, rows.reshape(-1, rows.shape[-1]), spec), spec)


def all_down(h: Array, state: FFNState, layer: Array | int, spec: FFNSpec) -> Array:
    """[tokens, d_out] of h: [tokens, f]."""
    rows = lax.dynamic_index_in_dim(state.down, layer, keepdims=False)
    return down_product(h, rows.reshape(spec.width, -1), spec)


def fetched_products(
    x: Array, state: FFNState, layer: Array | int, groups: Array, spec: FFNSpec
) -> tuple[Array, ...]:
    """For each projection the products [tokens, n] of the common groups and of others."""
    common, d_in = spec.common_groups, state.up.shape[-1]
    rows = fetch_groups(state.up, layer, groups[common:])
    # Plain matrices: an einsum over the groups was 19 times slower on CPU.
    found = _up_product(x, rows.reshape(-1, d_in), spec)
    if common:  # read in one piece, without a copy
        first = lax.dynamic_index_in_dim(state.up, layer, keepdims=False)[:common]
        found = jnp.concatenate([_up_product(x, first.reshape(-1, d_in), spec), found], axis=1)
    return _by_projection(found, spec)


def add_joined(
    y: Array, others: Sequence[Array], state: FFNState, layer: Array | int, *, spec: FFNSpec
) -> Array:
    """`y` with what other inputs [tokens, n] of the last product add to it, computed whole."""
    for x, rows in zip(others, state.joined, strict=True):
        y = y + down_product(x, lax.dynamic_index_in_dim(rows, layer, keepdims=False), spec)
    return y


def part_inputs(
    x: Array, state: PartState, layer: Array | int, *, spec: FFNSpec
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The products of another part [tokens, n], and its vectors [n], for x: [tokens, d_in]."""
    products = tuple(
        _up_product(x, lax.dynamic_index_in_dim(rows, layer, keepdims=False), spec)
        for rows in state.rows
    )
    vectors = (lax.dynamic_index_in_dim(v, layer, keepdims=False) for v in state.vectors)
    return products, tuple(vectors)


def _by_projection(products: Array, spec: FFNSpec) -> tuple[Array, ...]:
    """[tokens, n · P · group] as P arrays [tokens, n · group]."""
    tokens = products.shape[0]
    split = products.reshape(tokens, -1, spec.projections, spec.group)
    return tuple(split[:, :, p].reshape(tokens, -1) for p in range(spec.projections))


def _up_product(x: Array, rows: Array, spec: FFNSpec) -> Array:
    """[tokens, n] of x: [tokens, d_in] and rows: [n, d_in]."""
    return lax.dot_general(
        x,
        rows.astype(spec.compute_dtype),
        (((1,), (1,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.up_dtype,
    )


def down_product(h: Array, rows: Array, spec: FFNSpec) -> Array:
    """[tokens, d_out] of h: [tokens, n] and rows: [n, d_out]."""
    return lax.dot_general(
        h,
        rows.astype(h.dtype),
        (((1,), (0,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.down_dtype,
    )


def fetch_groups(stacked: Array, layer: Array | int, groups: Array) -> Array:
    """stacked[layer, groups]: [n, ...] of stacked: [L, G, ...] and groups: i32[n]."""
    layers, count = stacked.shape[:2]
    # One flat index: slicing the layer first would copy it.
    flat = stacked.reshape(layers * count, *stacked.shape[2:])
    return flat.at[groups + layer * count].get(mode="promise_in_bounds")
