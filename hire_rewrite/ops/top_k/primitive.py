"""The primitive behind `da_top_k`: its type, what it computes, its derivative and its batching.

It is bound for one shard of the last axis. Its parameters:

  k         how many values are wanted
  axes      names of the mesh's axes that the last axis is sharded over
  kept      how many values a shard hands on
  allowed   how many of the k greatest a row may miss; None if they need no counting
  few       the merge of lists of `kept`
  whole     the merge of lists of k (or of all that a shard has)
  around    all axes of the mesh that `shard_map` makes known: other rows may be elsewhere, but
            collectives are everyone's, so that all devices must agree on whether to merge again
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from hire_rewrite._compat import invariant_over, manual_axes, varying_over
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.top_k.keys import from_keys, lowest, to_keys
from hire_rewrite.ops.top_k.merge import Merge, cheapest, first, merged
from hire_rewrite.ops.top_k.select import top_k


def axis_size(name: str) -> int:
    """How many shards an axis has; an error if `shard_map` does not make it known here."""
    try:
        return lax.axis_size(name)
    except NameError:
        raise HireRewriteError(
            f"da_top_k: no axis {name!r} is bound here: call it inside shard_map over a mesh with "
            "that axis, or give mesh and spec in place of axis_name"
        ) from None


def merges_of(
    x: Array,
    k: int,
    counts: tuple[int, int],
    axes: tuple[str, ...],
    sizes: tuple[int, ...],
    slow: tuple[str, ...] = (),
    how: str | None = None,
) -> tuple[Merge, Merge]:
    """The merges of shorter and longer lists of the rows of x."""
    rows, pair = math.prod(x.shape[:-1]), 16 if x.dtype.itemsize > 4 else 8
    rows = rows if isinstance(rows, int) else 1  # a symbol
    few, whole = (
        cheapest(axes, sizes, count, k, rows=rows, pair_bytes=pair, slow=slow, how=how)
        for count in counts
    )
    return few, whole


def bind(
    x: Array,
    indices: Array,
    k: int,
    axes: tuple[str, ...],
    kept: int,
    allowed: int | None,
    merges: tuple[Merge, Merge],
) -> list[Array]:
    """Values [..., k] and indices i32[..., k] of a shard x: [..., m], with `merges_of` it."""
    few, whole = merges
    around = manual_axes()
    settings = {"allowed": allowed, "few": few, "whole": whole, "around": around}
    return da_top_k_p.bind(x, indices, k=k, axes=axes, kept=kept, **settings)


def _abstract(x: Any, indices: Any, *, k: int, axes: tuple[str, ...], **_: Any) -> tuple[Any, Any]:
    if x.sharding.spec[x.ndim - 1] is not None:
        raise HireRewriteError(
            f"da_top_k: the last axis of {x.str_short()} is sharded by its type: give mesh and "
            "spec, or call it inside shard_map with axis_name"
        )
    if indices.shape[-1] != x.shape[-1]:
        raise HireRewriteError(
            f"da_top_k: indices of shape {indices.shape} for values of shape {x.shape}"
        )
    values = invariant_over(x.update(shape=(*x.shape[:-1], k), weak_type=False), axes)
    return values, values.update(dtype=np.dtype(np.int32))


def _select(
    x: Array,
    indices: Array,
    *,
    k: int,
    axes: tuple[str, ...],
    kept: int,
    allowed: int | None,
    few: Merge,
    whole: Merge,
    around: tuple[str, ...],
) -> tuple[Array, Array]:
    """What the primitive computes, in other operations."""
    x = jnp.where(indices < 0, lowest(x.dtype), x)
    indices = jnp.broadcast_to(indices, x.shape)

    def best(count: int, merge: Merge) -> tuple[Array, Array]:
        values, places = top_k(x, count)
        at = jnp.take_along_axis(indices, places, axis=-1, mode="promise_in_bounds")
        return first(*merged(to_keys(values), at, merge), k)

    keys, chosen = best(kept, few)
    if allowed is not None:
        before = lax.psum(_before(to_keys(x), indices, keys, chosen), axes)
        missed = before - (chosen[..., :-1] >= 0).sum(-1, dtype=jnp.int32)
        keys, chosen = lax.cond(
            _anywhere((missed > allowed).any(), around),
            lambda: best(min(k, x.shape[-1]), whole),
            lambda: (keys, chosen),
        )
    return from_keys(keys, x.dtype), chosen


def _anywhere(flag: Array, axes: tuple[str, ...]) -> Array:
    """Whether a flag is set on any device along some axes: all then take the same branch."""
    return lax.pmax(varying_over(flag.astype(jnp.int32), axes), axes) > 0


def _before(keys: Array, indices: Array, last_keys: Array, chosen: Array) -> Array:
    """i32[...], how many pairs of a shard come before the last one that was chosen."""
    key, index = last_keys[..., -1:], chosen[..., -1:]
    unsigned = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint32)
    tied = (keys == key) & (unsigned(indices) < unsigned(index))
    return ((keys < key) | tied).sum(-1, dtype=jnp.int32)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    (x, indices), (tangent, _) = primals, tangents
    values, chosen = da_top_k_p.bind(x, indices, **params)
    moved: Any = ad.Zero(jax.typeof(values).to_tangent_aval())
    if type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0:
        moved = _taken(tangent, indices, chosen, params["axes"])
    return (values, chosen), (moved, ad.Zero(jax.typeof(chosen).to_tangent_aval()))


def _taken(array: Array, indices: Array, wanted: Array, axes: tuple[str, ...]) -> Array:
    """The entries of a sharded array: [..., m] at the global indices wanted: i32[..., k]."""
    mine, theirs = (array.astype(jnp.uint32) for array in (indices, wanted))
    mine = jnp.broadcast_to(mine, (*wanted.shape[:-1], mine.shape[-1]))
    search = jnp.vectorize(jnp.searchsorted, signature="(m),(k)->(k)")
    places = jnp.minimum(search(mine, theirs), mine.shape[-1] - 1)
    at = functools.partial(jnp.take_along_axis, indices=places, axis=-1, mode="promise_in_bounds")
    here = (at(mine) == theirs) & (wanted >= 0)
    return lax.psum(jnp.where(here, at(array), jnp.zeros((), array.dtype)), axes)


def _batch(
    axis: Any, operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Any, tuple[int | None, int | None]]:
    """Of one more axis of rows; or, if `axis` is one of the mesh's, of its shards side by side."""
    outside = axis.name not in params["axes"]
    if outside and all(dim is None for dim in dims):
        return da_top_k_p.bind(*operands, **params), (None, None)
    rows = [
        jnp.broadcast_to(operand, (axis.size, *operand.shape))
        if dim is None
        else jnp.moveaxis(operand, dim, 0)
        for operand, dim in zip(operands, dims, strict=True)
    ]
    x, indices = rows
    if outside:
        lead = (1,) * (x.ndim - indices.ndim)
        indices = indices.reshape(axis.size, *lead, *indices.shape[1:])
        return da_top_k_p.bind(x, indices, **params), (0, 0)
    x, indices = (jnp.moveaxis(row, 0, -2).reshape(*row.shape[1:-1], -1) for row in rows)
    axes = tuple(name for name in params["axes"] if name != axis.name)
    k, whole = params["k"], min(params["k"], x.shape[-1])
    kept = min(k, axis.size * params["kept"]) if axes else whole
    allowed = params["allowed"] if kept < whole else None
    how = params["whole"][-1].how if params["whole"] else None
    merges = merges_of(x, k, (kept, whole), axes, tuple(map(axis_size, axes)), how=how)
    return bind(x, indices, k, axes, kept, allowed, merges), (None, None)


da_top_k_p = Primitive("da_top_k")
da_top_k_p.multiple_results = True
da_top_k_p.def_abstract_eval(_abstract)
ad.primitive_jvps[da_top_k_p] = _jvp
batching.fancy_primitive_batchers[da_top_k_p] = _batch
mlir.register_lowering(da_top_k_p, mlir.lower_fun(_select, multiple_results=True))


_STATIC = ("k", "axes", "kept", "allowed", "few", "whole", "around")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _compiled(x: Array, indices: Array, **params: Any) -> list[Array]:
    return da_top_k_p.bind(x, indices, **params)


def _run(x: Array, indices: Array, **params: Any) -> list[Array]:
    with jax.disable_jit(False):  # or it would call itself
        return _compiled(x, indices, **params)


da_top_k_p.def_impl(_run)
