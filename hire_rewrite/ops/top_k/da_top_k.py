"""DA-TOP-k (arXiv 2402.09360): the k greatest of values that are sharded over devices.

Each shard selects its own greatest few, and only those are merged: with s shards s · keep pairs of
a value and an index travel in place of all values.

How few is a matter of recall. Under random placement its expectation has a closed form (`recall`).
Placement need not be random, so the misses are counted: each shard counts its values that come
before the last one of the result. That costs one pass over values that are at hand and one number
for each row, and where a row misses more than the target allows, the call merges whole lists of k.
So the recall of every row is at least the target, whatever the data.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hire_rewrite._compat import mesh_around, varying_over
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.top_k.keys import has_keys
from hire_rewrite.ops.top_k.merge import MERGES
from hire_rewrite.ops.top_k.primitive import axis_size, bind, merges_of
from hire_rewrite.ops.top_k.recall import allowed_misses, kept_per_shard
from hire_rewrite.settings import is_int


def da_top_k(
    x: Array,
    k: int,
    *,
    axis_name: str | Sequence[str] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    spec: PartitionSpec | None = None,
    recall_target: float = 0.99,
    keep: int | None = None,
    merge: str | None = None,
    indices: Array | None = None,
) -> tuple[Array, Array]:
    """The k greatest values along the last axis and their global indices, like `lax.top_k`.

    The last axis may be sharded over one or several axes of a mesh. Inside `shard_map`, x is a
    shard and `axis_name` says over which; elsewhere x is whole, and `spec` says how it lies on
    `mesh`. Nothing but few values and indices travels between devices.

    The order is that of `lax.top_k`: descending, NaN first, and of equal values the one with the
    lowest index. With `recall_target=1` (or k values kept) the result is equal to `lax.top_k`'s.
    Otherwise each row has at least that share of its k greatest values, the greatest among them.

    With n values in s shards of m, of which each hands on q, and random placement (arXiv
    2506.04165):

        expected recall = 1 − (s / k) Σ_{r > q} (r − q) C(k, r) C(n − k, m − r) / C(n, m)

    The target chooses q so that a row in a thousand misses more than it may. Misses are counted,
    and such a row (or data that do not lie at random) makes the call merge lists of k.

    Differentiable in x, as `lax.top_k` is; works under `vmap` (also with `axis_name`), `jit`,
    `scan` and `jax.export`.

    Args:
      x: [..., m], a shard, or [..., n]; floating point or integers.
      k: between 1 and n.
      axis_name: axes of a mesh that `shard_map` makes known here, the major one first.
      mesh, spec: how x lies on a mesh. Any other axes of x may be sharded too. n need not be
        divisible by the shards.
      recall_target: in (0, 1], the smallest share of the true k greatest in each row.
      keep: how many values each shard hands on, in place of what the target asks for; then
        misses are not counted.
      merge: `"gather"` or `"butterfly"` (see `merge`); by default whichever should be faster.
      indices: i32[m], with `axis_name` only: the global index of each place of the shard, if that
        is not `axis_index · m + place`. Different in all shards, ascending, and −1 for padding at
        the end. If there are fewer than k values, padding comes last in the result, as −1.

    Returns:
      Values [..., k] in the dtype of x, and indices i32[..., k], the same on all shards.

    Raises:
      HireRewriteError: an argument does not fit; it says which and what would.

    Examples:
      >>> import jax, jax.numpy as jnp, hire_rewrite as hire
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> logits = jnp.sin(jnp.arange(64.0))[None]
      >>> values, indices = hire.da_top_k(logits, 2, mesh=mesh, spec=jax.P(None, "model"))
      >>> indices.tolist() == jax.lax.top_k(logits, 2)[1].tolist()
      True
    """
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        raise HireRewriteError(
            f"da_top_k: x is a {type(x).__name__}: give an array of numbers"
        ) from None
    wanted = _Wanted(k, recall_target, keep, merge)
    wanted.check(x)
    if (axis_name is None) == (mesh is None):
        raise HireRewriteError(
            "da_top_k: give either axis_name, inside shard_map, or mesh and spec"
        )
    if mesh is not None:
        if spec is None or indices is not None:
            raise HireRewriteError(
                "da_top_k: mesh= goes with spec=, and indices= with axis_name= alone"
            )
        return _on_mesh(x, wanted, mesh, spec)
    if spec is not None:
        raise HireRewriteError("da_top_k: spec= goes with mesh=; inside shard_map leave it out")
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    sizes = tuple(map(axis_size, axes))
    m = x.shape[-1]
    if indices is None:
        start = lax.axis_index(axes) * m if axes else 0
        indices = start + jnp.arange(m, dtype=jnp.int32)
    elif indices.shape != (m,) or indices.dtype != jnp.int32:
        raise HireRewriteError(
            f"da_top_k: indices are {indices.dtype}{list(indices.shape)} and must be i32[{m}], "
            "one for each place of the shard"
        )
    return _sharded(x, indices, wanted, axes, sizes, m * math.prod(sizes))


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The arguments of a call that are not arrays; `slow` are axes between hosts."""

    k: int
    recall_target: float
    keep: int | None
    merge: str | None
    slow: tuple[str, ...] = ()

    def check(self, x: Array) -> None:
        if x.ndim < 1 or not has_keys(x.dtype):
            raise HireRewriteError(
                f"da_top_k: x is {x.dtype}{list(x.shape)}: give floating-point numbers or integers "
                "of whole bytes along at least one axis"
            )
        for name in ("k", "keep"):
            number = getattr(self, name)
            if not is_int(number) and (number is not None or name == "k"):
                raise HireRewriteError(f"da_top_k: {name}={number!r} must be an int")
            if number is not None and not 1 <= number < 2**31:
                raise HireRewriteError(
                    f"da_top_k: {name}={number} must be at least 1, and an index of 32 bits"
                )
        real = isinstance(self.recall_target, numbers.Real)
        if not real or not 0.0 < self.recall_target <= 1.0:
            raise HireRewriteError(
                f"da_top_k: recall_target={self.recall_target!r} must be in (0, 1]"
            )
        if self.merge not in (None, *MERGES):
            raise HireRewriteError(
                f"da_top_k: merge={self.merge!r} must be one of {', '.join(MERGES)}"
            )

    def kept(self, n: int, shards: int, whole: int) -> int:
        """How many values each shard hands on, of the `whole` that may count."""
        if self.k > n:
            raise HireRewriteError(
                f"da_top_k: k={self.k} of {n} values in {shards} shard(s): give a smaller k"
            )
        size = -(-n // shards)
        real = [min(size, max(0, n - i * size)) for i in range(shards)]
        counts = range(1, size + 1)
        enough = 1 + bisect.bisect_left(counts, self.k, key=lambda c: sum(min(c, r) for r in real))
        if self.keep is not None and self.keep < enough:
            raise HireRewriteError(
                f"da_top_k: keep={self.keep} values in each of {shards} shards are fewer than "
                f"k={self.k}: give keep at least {enough}"
            )
        formula = whole if shards == 1 else kept_per_shard(n, self.k, shards, self.recall_target)
        return min(whole, self.keep or max(formula, enough))


def _sharded(
    x: Array,
    indices: Array,
    wanted: _Wanted,
    axes: tuple[str, ...],
    sizes: tuple[int, ...],
    n: int,
) -> tuple[Array, Array]:
    """`da_top_k` of a shard x: [..., m] of n real values in all."""
    k, whole = wanted.k, min(wanted.k, x.shape[-1])
    kept = wanted.kept(n, math.prod(sizes), whole)
    counted = wanted.keep is None and kept < whole
    allowed = allowed_misses(k, wanted.recall_target) if counted else None
    merges = merges_of(x, k, (kept, whole), axes, sizes, wanted.slow, wanted.merge)
    if axes:
        x, indices = (varying_over(array, axes) for array in (x, indices))
    values, chosen = bind(x, indices, k, axes, kept, allowed, merges)
    return values, chosen


def _on_mesh(
    x: Array, wanted: _Wanted, mesh: Mesh | AbstractMesh, spec: PartitionSpec
) -> tuple[Array, Array]:
    """`da_top_k` of a whole array, in a `shard_map` over `mesh`."""
    parts = tuple(spec) + (None,) * (x.ndim - len(spec))
    names = [(part,) if isinstance(part, str) else tuple(part or ()) for part in parts]
    unknown = [name for part in names for name in part if name not in mesh.shape]
    if len(parts) > x.ndim or unknown:
        wrong = f"names {unknown[0]!r}" if unknown else f"has {len(parts)} parts"
        raise HireRewriteError(
            f"da_top_k: spec={spec} {wrong}, but x is {x.dtype}{list(x.shape)} and the mesh has "
            f"the axes {', '.join(map(str, mesh.shape))}: name those, a part for each axis of x"
        )
    axes, n = names[-1], x.shape[-1]
    sizes = tuple(mesh.shape[name] for name in axes)
    for axis, part in enumerate(names[:-1]):
        if x.shape[axis] % math.prod(mesh.shape[name] for name in part):
            raise HireRewriteError(
                f"da_top_k: axis {axis} of x, of size {x.shape[axis]}, cannot be sharded over "
                f"{part}: only the last axis may be uneven; leave it out of the spec, or pad x"
            )
    wanted = dataclasses.replace(wanted, slow=_across_hosts(mesh))
    m = -(-n // math.prod(sizes))
    padding = [(0, 0)] * (x.ndim - 1) + [(0, m * math.prod(sizes) - n)]

    def local(shard: Array) -> tuple[Array, Array]:
        places = (lax.axis_index(axes) * m if axes else 0) + jnp.arange(m, dtype=jnp.int32)
        indices = jnp.where(places < n, places, -1)
        return _sharded(shard, indices, wanted, axes, sizes, n)

    whole, lead = PartitionSpec(*parts), PartitionSpec(*parts[:-1], None)
    around, x = mesh_around(mesh), jnp.pad(x, padding)
    if set(mesh.axis_types) == {AxisType.Explicit}:  # shard_map then takes nothing else
        x = jax.sharding.reshard(x, whole if around is None else NamedSharding(mesh, whole))
    run = jax.shard_map(local, mesh=around, in_specs=whole, out_specs=(lead, lead))
    return run(x)


def _across_hosts(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of a mesh along which the process changes."""
    if isinstance(mesh, AbstractMesh):
        return ()
    hosts = np.array([device.process_index for device in mesh.devices.flat])
    hosts = hosts.reshape(mesh.devices.shape)
    return tuple(
        name for axis, name in enumerate(mesh.axis_names) if (hosts.take([0], axis) != hosts).any()
    )
