"""Products with rows that are fetched from where they lie, group by group.

The numbers of the groups are in scalar memory. Groups come in chunks: the copies of one chunk are
started before the one that is there already is used. (A grid step for each group would spend more
time on starting than on copying.)

Lists may end early: behind the end nothing is copied, and chunks that lie there are passed over.
`picked` beside has products with such lists of single rows.
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
    chunks, count = chunked(n, rows)
    length = tokens // lists  # tokens of one list

    def use(i: Array, gathered: Array, x: Any, out: Any) -> None:
        out[0] = lax.dot_general(x[0], gathered, (((1,), (1,)), ((), ())), **_SETTINGS)

    products = over_chunks(
        use,
        padded(index, chunks * count),
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
    chunks, count = chunked(n, rows)
    h = jnp.pad(h.astype(jnp.bfloat16), ((0, 0), (0, chunks * count - n), (0, 0)))
    h = jnp.moveaxis(h.reshape(tokens, chunks, count * m), 1, 0)

    def use(i: Array, gathered: Array, h: Any, out: Any) -> None:
        @pl.when(i == 0)
        def _() -> None:
            out[...] = jnp.zeros_like(out)

        out[...] += jnp.dot(h[0], gathered, **_SETTINGS)

    return over_chunks(
        use,
        padded(index[None], chunks * count),
        h,
        rows,
        chunks,
        x_block=pl.BlockSpec((1, tokens, count * m), lambda i, index: (i, 0, 0)),
        out_block=pl.BlockSpec((tokens, d), lambda i, index: (0, 0)),
        shape=(tokens, d),
        name="hire_fetched_sum",
        interpret=interpret,
    )


def over_chunks(
    use: Callable[..., None],
    index: Array,
    x: Array,
    rows: Array,
    chunks: int,
    *,
    ends: Array | None = None,
    x_block: pl.BlockSpec,
    out_block: pl.BlockSpec,
    shape: tuple[int, ...],
    name: str,
    interpret: bool,
) -> Array:
    """use(i, gathered, x, out) for each chunk i, whose rows are gathered: [count · m, d].

    Args:
      index: i32[chunks · count], in which chunks are numbers of groups.
      rows: [N, m, d] or, if a row is a group, [N, d].
      chunks: how many.
      ends: i32[lists], how many groups of each list there are; its chunks lie one after the other.
        What is gathered behind the end is zero. A chunk behind it is not used, but the first one of
        a list always is. None where all lists are full.
    """
    d = rows.shape[-1]
    count = index.size // chunks
    per = chunks if ends is None else chunks // ends.size

    def kernel(index: Any, *refs: Any) -> None:
        *ended, x, rows, out, buffer, sems = refs
        i = pl.program_id(0)

        def copy(chunk: Any, j: Any) -> Any:
            slot = lax.rem(chunk, 2)
            source = rows.at[index[chunk * count + j]]
            return pltpu.make_async_copy(source, buffer.at[slot, j], sems.at[slot])

        def there(chunk: Any) -> Any:
            """How many groups of a chunk are in its list."""
            if not ended:
                return count
            before = lax.rem(chunk, per) * count
            return jnp.clip(ended[0][lax.div(chunk, per)] - before, 0, count)

        def start(chunk: Any) -> None:
            lax.fori_loop(0, there(chunk), lambda j, _: copy(chunk, j).start(), None)

        @pl.when(i == 0)
        def _() -> None:
            start(i)

        @pl.when(i + 1 < chunks)
        def _() -> None:
            start(i + 1)

        fetched = there(i)
        lax.fori_loop(0, fetched, lambda j, _: copy(i, j).wait(), None)
        if not ended:
            use(i, buffer[i % 2].reshape(-1, d), x, out)
            return

        @pl.when((fetched > 0) | (lax.rem(i, per) == 0))
        def _() -> None:
            gathered = buffer[lax.rem(i, 2)].reshape(-1, d)
            row = lax.broadcasted_iota(jnp.int32, (gathered.shape[0], 1), 0)
            real = row < fetched * (gathered.shape[0] // count)  # others are of an earlier chunk
            use(i, jnp.where(real, gathered, jnp.zeros_like(gathered)), x, out)

    groups = math.prod(rows.shape[1:])
    scalars = [index] if ends is None else [index, ends]
    read = index.size * groups * rows.dtype.itemsize
    others = (x.size * x.dtype.itemsize, 4 * math.prod(shape), *(4 * s.size for s in scalars))
    return pl.pallas_call(
        kernel,
        out_shape=result(shape, rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(chunks,),
            in_specs=[x_block, pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=out_block,
            scratch_shapes=[
                pltpu.VMEM((2, count, *rows.shape[1:]), rows.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[-2] * index.size * groups,
            transcendentals=0,
            bytes_accessed=read + sum(others),
        ),
        name=name,
        interpret=interpret,
    )(*scalars, x, in_hbm(rows, interpret))


def chunked(n: int, rows: Array) -> tuple[int, int]:
    """How many chunks n groups come in, and how many groups are in each."""
    most = max(1, CHUNK // (math.prod(rows.shape[1:]) * rows.dtype.itemsize))
    chunks = -(-n // most)
    return chunks, -(-n // chunks)


def padded(index: Array, count: int) -> Array:
    """Lists filled up with their last one: fewer groups than chunks are fetched in vain."""
    return jnp.pad(index, ((0, 0), (0, count - index.shape[1])), mode="edge").reshape(-1)
