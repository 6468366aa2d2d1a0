"""Products with rows that are fetched from where they lie, group by group.

The numbers of the groups are in scalar memory. Groups come in chunks: the copies of one chunk are
started before the one that is there already is used. (A grid step for each group would spend more
time on starting than on copying.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_rewrite.ops.kernels.tpu.common import in_hbm, result
from hire_rewrite.ops.kernels.tpu.fits import CHUNK, TILE

_SETTINGS: dict[str, Any] = {
    "precision": lax.Precision.DEFAULT,
    "preferred_element_type": jnp.float32,
}


@functools.partial(jax.jit, static_argnames="interpret")
def gathered_matmul(x: Array, rows: Array, index: Array, *, interpret: bool = False) -> Array:
    """f32[tokens, n · m], products with rows that are read where they are.

    Args:
      x: [tokens, d]; rounded to bfloat16.
      rows: bf16[N, m, d], m a multiple of 8, or 1 and N a multiple of 8.
      index: i32[1, n], for all tokens, or i32[tokens, n].
    """
    if rows.shape[1] > 1:
        return _group_products(x, rows, index, interpret)
    tiles = rows.reshape(-1, TILE, rows.shape[2])
    products = _group_products(x, tiles, index // TILE, interpret)
    products = products.reshape(x.shape[0], -1, TILE)
    return jnp.take_along_axis(products, (index % TILE)[..., None], axis=2)[..., 0]


def _group_products(x: Array, rows: Array, index: Array, interpret: bool) -> Array:
    tokens, d = x.shape
    m, (lists, n) = rows.shape[1], index.shape
    chunks, count = _chunks(n, rows)
    length = tokens // lists  # tokens of one list

    def use(i: Array, gathered: Array, x: Any, out: Any) -> None:
        out[0] = lax.dot_general(x[0], gathered, (((1,), (1,)), ((), ())), **_SETTINGS)

    products = _over_chunks(
        use,
        _padded(index, chunks * count),
        x.astype(jnp.bfloat16).reshape(lists, length, d),
        rows,
        lists * chunks,
        x_block=pl.BlockSpec((1, length, d), lambda i, index: (lax.div(i, chunks), 0, 0)),
        out_block=pl.BlockSpec((1, length, count * m), lambda i, index: (i, 0, 0)),
        shape=(lists * chunks, length, count * m),
        name="hire_fetched_product",
        interpret=interpret,
    )
    products = jnp.moveaxis(products.reshape(lists, chunks, length, -1), 1, 2)
    return products.reshape(tokens, -1)[:, : n * m]


@functools.partial(jax.jit, static_argnames="interpret")
def gathered_sum(h: Array, rows: Array, index: Array, *, interpret: bool = False) -> Array:
    """f32[tokens, d], the sum of rows[index] with the weights h.

    Args:
      h: [tokens, n, m]; rounded to bfloat16.
      rows: bf16[N, m, d].
      index: i32[n].
    """
    tokens, n, m = h.shape
    d = rows.shape[2]
    chunks, count = _chunks(n, rows)
    h = jnp.pad(h.astype(jnp.bfloat16), ((0, 0), (0, chunks * count - n), (0, 0)))
    h = jnp.moveaxis(h.reshape(tokens, chunks, count * m), 1, 0)

    def use(i: Array, gathered: Array, h: Any, out: Any) -> None:
        @pl.when(i == 0)
        def _() -> None:
            out[...] = jnp.zeros_like(out)

        out[...] += jnp.dot(h[0], gathered, **_SETTINGS)

    return _over_chunks(
        use,
        _padded(index[None], chunks * count),
        h,
        rows,
        chunks,
        x_block=pl.BlockSpec((1, tokens, count * m), lambda i, index: (i, 0, 0)),
        out_block=pl.BlockSpec((tokens, d), lambda i, index: (0, 0)),
        shape=(tokens, d),
        name="hire_fetched_sum",
        interpret=interpret,
    )


def _over_chunks(
    use: Callable[..., None],
    index: Array,
    x: Array,
    rows: Array,
    chunks: int,
    *,
    x_block: pl.BlockSpec,
    out_block: pl.BlockSpec,
    shape: tuple[int, ...],
    name: str,
    interpret: bool,
) -> Array:
    """use(i, gathered, x, out) for each chunk i, whose rows are gathered: [count · m, d]."""
    _, m, d = rows.shape
    count = index.size // chunks

    def kernel(index: Any, x: Any, rows: Any, out: Any, buffer: Any, sems: Any) -> None:
        i = pl.program_id(0)

        def copy(chunk: Any, j: Any) -> Any:
            slot = chunk % 2
            source = rows.at[index[chunk * count + j]]
            return pltpu.make_async_copy(source, buffer.at[slot, j], sems.at[slot])

        def start(chunk: Any) -> None:
            lax.fori_loop(0, count, lambda j, _: copy(chunk, j).start(), None)

        @pl.when(i == 0)
        def _() -> None:
            start(i)

        @pl.when(i + 1 < chunks)
        def _() -> None:
            start(i + 1)

        lax.fori_loop(0, count, lambda j, _: copy(i, j).wait(), None)
        use(i, buffer[i % 2].reshape(count * m, d), x, out)

    read = index.size * m * d * rows.dtype.itemsize
    others = (x.size * x.dtype.itemsize, 4 * math.prod(shape))
    return pl.pallas_call(
        kernel,
        out_shape=result(shape, rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(chunks,),
            in_specs=[x_block, pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=out_block,
            scratch_shapes=[
                pltpu.VMEM((2, count, m, d), rows.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[-2] * index.size * m * d,
            transcendentals=0,
            bytes_accessed=read + sum(others) + index.size * 4,
        ),
        name=name,
        interpret=interpret,
    )(index, x, in_hbm(rows, interpret))


def _chunks(n: int, rows: Array) -> tuple[int, int]:
    """How many chunks n groups come in, and how many groups are in each."""
    most = max(1, CHUNK // (math.prod(rows.shape[1:]) * rows.dtype.itemsize))
    chunks = -(-n // most)
    return chunks, -(-n // chunks)


def _padded(index: Array, count: int) -> Array:
    """Lists filled up with their last one: fewer groups than chunks are fetched in vain."""
    return jnp.pad(index, ((0, 0), (0, count - index.shape[1])), mode="edge").reshape(-1)
