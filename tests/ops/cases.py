"""Predictors and states that the tests of `ops` share."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.ops import narrow, quantize
from hire_rewrite.ops.encodings import Blocks, Encoding, Float, product
from hire_rewrite.ops.ffn.block import FFNSpec, FFNState
from hire_rewrite.ops.ffn.tail import PredictedFFNSpec, PredictedFFNState
from hire_rewrite.ops.head.head import HeadSpec, HeadState
from hire_rewrite.ops.kernels import register_kernel
from tests.cases import Oracle

__all__ = [
    "Oracle",
    "as_other_backends",
    "ffn",
    "fitted",
    "head",
    "nibbles",
    "normal",
    "predicted_ffn",
    "scaled",
    "stack",
]


def stack(states: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves)), *states)


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers. They come from numpy, which compiles nothing for a new shape."""
    return scaled(1.0, seed, *shape, dtype=dtype)


def scaled(factor: float, seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    numbers = factor * np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(np.asarray(numbers, dtype))


def nibbles(packed: np.ndarray, *, signed: bool) -> np.ndarray:
    """i64[..., d], the 4-bit integers of i8[..., d/2] (see `quantize.unpack`), by NumPy alone."""
    low, high = packed.view(np.uint8) & 15, packed.view(np.uint8) >> 4
    numbers = np.concatenate([low, high], -1).astype(np.int64)
    return np.where(signed & (numbers > 7), numbers - 16, numbers)


def fitted(predictor: Any, rows: Any) -> Any:
    """The predictor's state for rows: [L, n, d]."""
    return stack([_fit(predictor)(layer) for layer in np.asarray(rows)])


@functools.cache
def _fit(predictor: Any) -> Any:
    """Compiled once for equal predictors, not once for each test."""
    return jax.jit(predictor.fit)


@contextlib.contextmanager
def as_other_backends() -> Iterator[None]:
    """Products on CPU as backends that are not CPU compute them."""

    def by_rows(x: Any, rows: Any, layer: Any, scale: Any = None, offset: Any = None) -> Any:
        found = narrow._matmul_default(x.astype(jnp.float32), rows, layer)
        return narrow.scaled(found, layer, scale, offset)

    def by_blocks(x: Any, packed: Any, scale: Any, layer: Any) -> Any:
        x = quantize.rounded_blocks(x, narrow.block_of(x, scale))
        return narrow._block_matmul_default(x, packed, scale, layer)

    def by_encoding(
        x: Any, integers: Any, scale: Any, minimum: Any, layer: Any, *, bits: int,
        round_inputs: bool = False,
    ) -> Any:  # fmt: skip
        x = x.astype(jnp.float32)
        if round_inputs:
            x = quantize.rounded_blocks(x, product.input_block(x, scale))
        arrays = (array for array in (integers, scale, minimum) if array is not None)
        return product._product_default(x, layer, *arrays, bits=bits, precision=None)

    with (
        register_kernel(narrow.matmul, "cpu", by_rows),
        register_kernel(narrow.block_matmul, "cpu", by_blocks),
        register_kernel(product.block_product, "cpu", by_encoding),
    ):
        yield


def head(
    predictor: Any,
    *,
    layers: int = 1,
    width: int = 200,
    d: int = 16,
    k: int = 4,
    candidates: int = 20,
    tail: str = "predicted",
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> tuple[HeadSpec, HeadState]:
    rows = normal(seed, layers, width, d, dtype=dtype)
    spec = HeadSpec(width, k, candidates, tail, jnp.dtype(dtype), None, jnp.dtype(dtype))
    return spec, HeadState(rows, fitted(predictor, rows))


def ffn(
    predictor: Any,
    *,
    layers: int = 1,
    width: int = 96,
    d: int = 16,
    group: int = 4,
    projections: int = 2,
    k_groups: int = 3,
    candidate_groups: int = 6,
    sparse: bool = True,
    gate_bias: int | None = None,
    vectors: int = 0,
    dtype: Any = jnp.float32,
    seed: int = 0,
    **more: Any,
) -> tuple[FFNSpec, FFNState, tuple[jax.Array, ...]]:
    """A block, and its weights as a model has them: P first matrices [L, f, d], the second."""
    groups = width // group
    first = tuple(
        scaled(d**-0.5, seed + 10 * p, layers, width, d, dtype=dtype) for p in range(projections)
    )
    second = scaled(width**-0.5, seed + 1, layers, width, d, dtype=dtype)
    spec = FFNSpec(
        width=width,
        group=group,
        projections=projections,
        k_groups=k_groups,
        candidate_groups=candidate_groups,
        sparse=sparse,
        gate_bias=gate_bias,
        up_dtype=jnp.dtype(dtype),
        down_dtype=jnp.dtype(dtype),
        precision=None,
        compute_dtype=jnp.dtype(dtype),
        **more,
    )
    stacked = np.stack(first, 1)
    up = jnp.asarray(stacked.reshape(layers, projections, groups, group, d).swapaxes(1, 2))
    extra = tuple(
        normal(seed + 100 + i, layers, groups, group, dtype=dtype) for i in range(vectors)
    )
    scored = stacked[:, :, spec.common_groups * group :]
    by_part = scored.reshape(layers, projections, spec.num_shards, -1, d).swapaxes(1, 2)
    predicted = fitted(predictor, by_part.reshape(layers, spec.scored_rows, d))
    state = FFNState(up, second.reshape(layers, groups, group, d), extra, predicted)
    if spec.criterion == "output":
        state = state._replace(norms=jnp.linalg.norm(state.down, axis=-1))
    return spec, state, (*first, second)


_BLOCKS = Blocks(8)


def predicted_ffn(
    *,
    encoding: Encoding = _BLOCKS,
    exact: Encoding | None = None,
    layers: int = 1,
    width: int = 96,
    d: int = 32,
    group: int = 1,
    projections: int = 2,
    k_groups: int = 12,
    vectors: int = 0,
    criterion: str = "output",
    round_inputs: bool = False,
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> tuple[PredictedFFNSpec, PredictedFFNState, tuple[jax.Array, ...]]:
    """A block with guessed neurons, and its weights as in `ffn`. The second rows have norms of all
    sizes, so that the criteria choose different neurons."""
    first = tuple(
        scaled(d**-0.5, seed + 10 * p, layers, width, d, dtype=dtype) for p in range(projections)
    )
    size = np.exp(np.random.default_rng(seed).standard_normal((layers, width, 1)))
    second = scaled(width**-0.5, seed + 1, layers, width, d) * size
    second = second.astype(dtype)
    if exact is None and k_groups:
        exact = Float("bfloat16" if dtype == jnp.bfloat16 else "float32")
    spec = PredictedFFNSpec(
        up_dtype=jnp.dtype(dtype),
        down_dtype=jnp.dtype(dtype),
        precision=None,
        compute_dtype=jnp.dtype(dtype),
        width=width,
        group=group,
        projections=projections,
        k_groups=k_groups,
        criterion=criterion,
        encoding=encoding,
        exact=exact,
        round_inputs=round_inputs,
    )

    def stored(encoding: Encoding | None, rows: Any) -> Any:
        return {} if encoding is None else stack([encoding.store(layer) for layer in rows])

    state = PredictedFFNState(
        up=stored(encoding, jnp.concatenate(first, axis=1)),
        down=stored(encoding, second.swapaxes(1, 2)),
        exact_up=stored(exact, jnp.stack(first, 2).reshape(layers, -1, d)),
        exact_down=stored(exact, second),
        vectors=tuple(normal(seed + 100 + i, layers, width, dtype=dtype) for i in range(vectors)),
    )
    if criterion == "output":
        state = state._replace(norms=jnp.linalg.norm(second.astype(jnp.float32), axis=-1))
    return spec, state, (*first, second)
