"""The products of a block: of all neurons, of those that are fetched, of parts that it shares."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat
from hire_rewrite.ops import kernels
from hire_rewrite.ops.ffn.block import FFNSpec, FFNState, PartState
from hire_rewrite.ops.products import where_they_are

Kernel = Callable[[Array, Array, Array], Array]
"""`fetched_product` or `fetched_sum` of a platform."""

_PIECE = 1 << 22
"""Bytes of rows that are fetched at a time on CPU. A large copy is slow there, because its memory
is new at every call: 50 MB took 33 ms, and 6 ms in pieces of 2 to 8 MB with the product."""


def all_products(x: Array, state: FFNState, layer: Array | int, spec: FFNSpec) -> tuple[Array, ...]:
    """For each projection the products of all neurons, [tokens, f]."""
    rows = lax.dynamic_index_in_dim(state.up, layer, keepdims=False)
    return _by_projection(_up_product(x, rows.reshape(-1, rows.shape[-1]), spec), spec)


def all_down(h: Array, state: FFNState, layer: Array | int, spec: FFNSpec) -> Array:
    """[tokens, d_out] of h: [tokens, f]."""
    rows = lax.dynamic_index_in_dim(state.down, layer, keepdims=False)
    return _down_product(h, rows.reshape(spec.width, -1), spec, spec.down_dtype)


def fetched_products(
    x: Array, state: FFNState, layer: Array | int, groups: Array, spec: FFNSpec
) -> tuple[Array, ...]:
    """For each projection the products [tokens, n] of the common groups and of others."""
    common, d_in = spec.common_groups, state.up.shape[-1]
    layer = jnp.asarray(layer, jnp.int32)

    def in_jax(x: Array, up: Array, layer: Array, groups: Array) -> Array:
        def product(chosen: Array) -> Array:
            # Plain matrices: an einsum over the groups was 19 times slower on CPU.
            return _up_product(x, fetch_groups(up, layer, chosen).reshape(-1, d_in), spec)

        def in_pieces(chosen: Array) -> Array:
            pieces, count = _pieces(chosen, up)
            found = lax.map(product, pieces)  # [pieces, tokens, n]
            return jnp.moveaxis(found, 0, 1).reshape(x.shape[0], -1)[:, : count * _members(up)]

        return _on_cpu(in_pieces, product, groups, up)

    def by(kernel: Kernel, x: Array, up: Array, layer: Array, groups: Array) -> Array:
        rows, index = where_they_are(up, layer, groups)
        return kernel(x.astype(jnp.float32), rows, index[None]).astype(spec.up_dtype)

    dtypes = (state.up.dtype, x.dtype, spec.compute_dtype, spec.up_dtype or x.dtype)
    cpu = functools.partial(by, kernels.cpu.fetched_product)
    tpu = functools.partial(by, kernels.tpu.fetched_product)
    own = {
        "cpu": cpu if kernels.cpu.usable(*dtypes) else None,
        "tpu": tpu if kernels.tpu.fits_groups(x, state.up) else None,
    }
    found = kernels.call(in_jax, x, state.up, layer, groups[common:], **own)
    if common:  # read in one piece, without a copy
        first = lax.dynamic_index_in_dim(state.up, layer, keepdims=False)[:common]
        found = jnp.concatenate([_up_product(x, first.reshape(-1, d_in), spec), found], axis=1)
    return _by_projection(found, spec)


def fetched_down(
    h: Array, state: FFNState, layer: Array | int, groups: Array, spec: FFNSpec
) -> Array:
    """[tokens, d_out] of h: [tokens, n, group], the activations of n groups."""
    tokens, d_out = h.shape[0], state.down.shape[-1]
    layer = jnp.asarray(layer, jnp.int32)

    def in_jax(h: Array, down: Array, layer: Array, groups: Array) -> Array:
        def product(h: Array, chosen: Array, dtype: Any) -> Array:
            rows = fetch_groups(down, layer, chosen).reshape(-1, d_out)
            return _down_product(h.reshape(tokens, -1), rows, spec, dtype)

        def in_pieces(chosen: Array) -> Array:
            pieces, count = _pieces(chosen, down)
            padded = jnp.pad(h, ((0, 0), (0, pieces.size - count), (0, 0)))
            split = jnp.moveaxis(padded.reshape(tokens, *pieces.shape, spec.group), 1, 0)

            def add(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
                return total + product(*piece, wide), None

            wide = jnp.promote_types(spec.down_dtype, jnp.float32)
            axes = _compat.varying_axes((h, down, layer, groups))
            empty = _compat.varying_over(jnp.zeros((tokens, d_out), wide), axes)
            total, _ = lax.scan(add, empty, (split, pieces))
            return total.astype(spec.down_dtype)

        whole = functools.partial(product, h, dtype=spec.down_dtype)
        return _on_cpu(in_pieces, whole, groups, down)

    def by(kernel: Kernel, h: Array, down: Array, layer: Array, groups: Array) -> Array:
        rows, index = where_they_are(down, layer, groups)
        return kernel(h.astype(jnp.float32), rows, index).astype(spec.down_dtype)

    dtypes = (state.down.dtype, h.dtype, spec.down_dtype or h.dtype)
    cpu = functools.partial(by, kernels.cpu.fetched_sum)
    tpu = functools.partial(by, kernels.tpu.fetched_sum)
    own = {
        "cpu": cpu if kernels.cpu.usable(*dtypes) else None,
        "tpu": tpu if kernels.tpu.fits_groups(h, state.down) else None,
    }
    return kernels.call(in_jax, h, state.down, layer, groups, **own)


def _on_cpu(
    in_pieces: Callable[[Array], Array],
    whole: Callable[[Array], Array],
    groups: Array,
    stacked: Array,
) -> Array:
    """One of two forms: on CPU rows are fetched in pieces where they are many."""
    if groups.size <= _per_piece(stacked):
        return whole(groups)
    return lax.platform_dependent(groups, cpu=in_pieces, default=whole)


def _pieces(groups: Array, stacked: Array) -> tuple[Array, int]:
    """i32[pieces, n], groups of which the last ones may be filled up, and how many are real."""
    step, count = _per_piece(stacked), groups.size
    return jnp.pad(groups, (0, -count % step)).reshape(-1, step), count


def _per_piece(stacked: Array) -> int:
    """Groups of stacked: [L, G, ...] that are fetched at a time."""
    size = math.prod(stacked.shape[2:]) * max(stacked.dtype.itemsize, 4)
    return max(1, _PIECE // size)


def _members(stacked: Array) -> int:
    """Rows of a group of stacked: [L, G, ..., d]."""
    return math.prod(stacked.shape[2:-1])


def add_joined(
    y: Array, others: Sequence[Array], state: FFNState, layer: Array | int, *, spec: FFNSpec
) -> Array:
    """`y` with what other inputs [tokens, n] of the last product add to it, computed whole."""
    for x, rows in zip(others, state.joined, strict=True):
        rows = lax.dynamic_index_in_dim(rows, layer, keepdims=False)
        y = y + _down_product(x, rows, spec, spec.down_dtype)
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


def _down_product(h: Array, rows: Array, spec: FFNSpec, dtype: Any) -> Array:
    """[tokens, d_out] of h: [tokens, n] and rows: [n, d_out]."""
    return lax.dot_general(
        h,
        rows.astype(h.dtype),
        (((1,), (0,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=dtype,
    )


def fetch_groups(stacked: Array, layer: Array | int, groups: Array) -> Array:
    """stacked[layer, groups]: [n, ...] of stacked: [L, G, ...] and groups: i32[n]."""
    layers, count = stacked.shape[:2]
    # One flat index: slicing the layer first would copy it.
    flat = stacked.reshape(layers * count, *stacked.shape[2:])
    return flat.at[groups + layer * count].get(mode="promise_in_bounds")
