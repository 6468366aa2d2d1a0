"""The kernels for rows in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from hire_rewrite.ops import narrow
from hire_rewrite.ops.encodings.product import Matrix, input_block
from hire_rewrite.ops.kernels.cpu.library import call, calls, one, usable

_FACTORS = frozenset(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def block_product(
    x: Array,
    integers: Array,
    scale: Array,
    minimum: Array | float | None,
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> Array:
    matrix = integers, scale, minimum
    (y,) = block_products(x, (matrix,), layer, bits=bits, round_inputs=round_inputs)
    return y


def block_products(
    x: Array,
    several: Sequence[Matrix],
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> Sequence[Array]:
    rounded = input_block(x, several[0][1]) if round_inputs else 0
    return _products_of_blocks(x, several, layer, rounded)


def picked_products(
    x: Array,
    matrix: Matrix,
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> Array:
    operands = (*_operands([matrix]), one(layer), picked.astype(jnp.int32))
    return call("picked_product", picked.shape, x.astype(jnp.float32), *operands)


def picked_sums(
    ontos: Sequence[Array],
    h: Array,
    several: Sequence[Matrix],
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> Sequence[Array]:
    operands = [h.astype(jnp.float32), one(layer), picked.astype(jnp.int32)]
    for onto, matrix in zip(ontos, several, strict=True):
        operands += onto, *_operands([matrix])
    return calls("picked_sum", [onto.shape for onto in ontos], *operands)


def block_matmul(x: Array, packed: Array, scale: Array, layer: Array | int) -> Array:
    (y,) = _products_of_blocks(x, [(packed, scale, None)], layer, narrow.block_of(x, scale))
    return y


def _products_of_blocks(
    x: Array, several: Sequence[Matrix], layer: Array | int, rounded: int
) -> Sequence[Array]:
    """`block_products` of x rounded to 8 bits in blocks of so many columns, of x itself for 0."""
    operands = (x.astype(jnp.float32), one(layer), *_operands(several))
    shapes = [(x.shape[0], integers.shape[1]) for integers, *_ in several]
    return calls("block_product", shapes, *operands, input_block=np.int64(rounded))


def _operands(several: Sequence[Matrix]) -> list[Array]:
    """Of each matrix its three arrays; the last may be empty, or one number."""
    operands: list[Array] = []
    for integers, scale, minimum in several:
        if minimum is None:
            minimum = jnp.zeros((*scale.shape[:2], 0), scale.dtype)
        elif jnp.ndim(minimum) == 0:
            minimum = jnp.asarray(minimum, jnp.float32).reshape(1)
        operands += integers, scale, jnp.asarray(minimum)
    return operands


def fits_blocks(
    x: Array,
    integers: Array,
    scale: Array,
    minimum: Array | float | None,
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> bool:
    """The library reads rows, and of 4 bits their halves, in pieces of 32 columns."""
    if not usable(x) or integers.size == 0:
        return False
    d, blocks = x.shape[1], scale.shape[2]
    known = jnp.dtype(scale.dtype) in _FACTORS
    if minimum is not None and jnp.ndim(minimum):
        known = known and jnp.result_type(minimum) in _FACTORS
    whole = d % (32 * blocks) == 0 and (bits == 8 or d // 2 % 32 == 0)
    return known and whole and d <= 65536 and integers.dtype == jnp.int8


def fit_blocks(
    x: Array,
    several: Sequence[Matrix],
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> bool:
    """Those of one form, all of which fit."""
    forms = {(scale.shape[2], minimum is None) for _, scale, minimum in several}
    settings: dict[str, Any] = {"bits": bits, "round_inputs": round_inputs}
    return len(forms) == 1 and all(fits_blocks(x, *m, layer, **settings) for m in several)


def fits_picked(
    x: Array,
    matrix: Matrix,
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> bool:
    few = isinstance(picked.size, int) and picked.size > 0
    return few and fits_blocks(x, *matrix, layer, bits=bits)


def fits_picked_sums(
    ontos: Sequence[Array], h: Array, several: Sequence[Matrix], *rest: Any, bits: int
) -> bool:
    pairs = zip(ontos, several, strict=True)
    return all(fits_picked(onto, matrix, *rest, bits=bits) for onto, matrix in pairs)


def fits_block_matmul(x: Array, packed: Array, scale: Array, layer: Array | int) -> bool:
    return fits_blocks(x, packed, scale, None, layer, bits=4)
