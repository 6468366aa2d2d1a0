"""The products of a block: of all neurons, of those that are fetched, of parts that it shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.block import FFNSpec, FFNState, PartState
from hire_rewrite.ops.gather import gathered_matmul, gathered_sum

__all__ = [
    "add_joined",
    "all_down",
    "all_products",
    "fetched_down",
    "fetched_products",
    "part_inputs",
]


def all_products(x: Array, state: FFNState, layer: Array | int, spec: FFNSpec) -> tuple[Array, ...]:
    """For each projection the products of all neurons, [tokens, f]."""
    rows = _at(state.up, layer)
    return _by_projection(_up_product(x, rows.reshape(-1, rows.shape[-1]), spec), spec)


def all_down(h: Array, state: FFNState, layer: Array | int, spec: FFNSpec) -> Array:
    """[tokens, d_out] of h: [tokens, f]."""
    return _down_product(h, _at(state.down, layer).reshape(spec.width, -1), spec)


def fetched_products(
    x: Array, state: FFNState, layer: Array | int, groups: Array, spec: FFNSpec
) -> tuple[Array, ...]:
    """For each projection the products [tokens, n] of the common groups and of others."""
    common = spec.common_groups
    products = gathered_matmul(
        x,
        state.up,
        layer,
        groups[common:],
        compute_dtype=spec.compute_dtype,
        out_dtype=spec.up_dtype,
        precision=spec.precision,
    )
    if common:  # read in one piece, without a copy
        first = _at(state.up, layer)[:common].reshape(-1, x.shape[1])
        products = jnp.concatenate([_up_product(x, first, spec), products], axis=1)
    return _by_projection(products, spec)


def fetched_down(
    h: Array, state: FFNState, layer: Array | int, groups: Array, spec: FFNSpec
) -> Array:
    """[tokens, d_out] of h: [tokens, n, group], the activations of n groups."""
    settings: dict[str, Any] = {"out_dtype": spec.down_dtype, "precision": spec.precision}
    return gathered_sum(h, state.down, layer, groups, **settings)


def add_joined(
    y: Array, others: Sequence[Array], state: FFNState, layer: Array | int, *, spec: FFNSpec
) -> Array:
    """`y` with what other inputs [tokens, n] of the last product add to it, computed whole."""
    for x, rows in zip(others, state.joined, strict=True):
        y = y + _down_product(x, _at(rows, layer), spec)
    return y


def part_inputs(
    x: Array, state: PartState, layer: Array | int, *, spec: FFNSpec
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The products of another part [tokens, n], and its vectors [n], for x: [tokens, d_in]."""
    products = tuple(_up_product(x, _at(rows, layer), spec) for rows in state.rows)
    return products, tuple(_at(vector, layer) for vector in state.vectors)


def _at(stacked: Array, layer: Array | int) -> Array:
    return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _by_projection(products: Array, spec: FFNSpec) -> tuple[Array, ...]:
    """[tokens, n · P · group] as P arrays [tokens, n · group]."""
    tokens, n = products.shape[0], products.shape[1] // (spec.projections * spec.group)
    split = products.reshape(tokens, n, spec.projections, spec.group)
    return tuple(split[:, :, p].reshape(tokens, n * spec.group) for p in range(spec.projections))


def _up_product(x: Array, rows: Array, spec: FFNSpec) -> Array:
    """[tokens, n] of x: [tokens, d_in] and rows: [n, d_in]."""
    return lax.dot_general(
        x,
        rows.astype(spec.compute_dtype),
        (((1,), (1,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.up_dtype,
    )


def _down_product(h: Array, rows: Array, spec: FFNSpec) -> Array:
    """[tokens, d_out] of h: [tokens, n] and rows: [n, d_out]."""
    return lax.dot_general(
        h,
        rows.astype(h.dtype),
        (((1,), (0,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.down_dtype,
    )
