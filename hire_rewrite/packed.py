"""The packed form of a model's weights: what stands where the parameters stood."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.learned import Learnings

__all__ = ["Origin", "Packed"]


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a `Packed` was made from: the structure, paths, shapes and dtypes of the weights."""

    tree: Any
    paths: tuple[str, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Computed once: a `jit` asks for it at every call."""
        return hash(self.paths)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "sites"],
    meta_fields=["fingerprint", "origin", "layout", "learned"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree of arrays, made by `pack` and passed where the weights stood.

    Attributes:
      weights: the weights that the rewritten function still reads, by path. The dense copies of
        rewritten weights are not among them (a tied embedding stays).
      sites: for each rewritten site its rows, row-major, and what its predictor needs.
      fingerprint: of the plan that it was made for.
      origin: what it was made from.
      layout: shapes and dtypes of all its arrays.
      learned: what calibration told about sites, as pairs (name, static numbers).
    """

    weights: dict[str, jax.Array]
    sites: dict[str, Any]
    fingerprint: str
    origin: Origin
    layout: tuple[jax.ShapeDtypeStruct, ...]
    learned: Learnings = ()

    def check(self) -> None:
        """Raise `HireRewriteError` if an array has not the shape and dtype it was packed with."""
        found = jax.tree_util.tree_leaves_with_path((self.weights, self.sites))
        for (path, leaf), want in zip(found, self.layout, strict=True):
            if (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
                raise HireRewriteError(
                    f"Packed{jax.tree_util.keystr(path[1:])} is {leaf.dtype}{list(leaf.shape)} but "
                    f"was packed for {want.dtype}{list(want.shape)}: pack again from the weights "
                    "instead of changing the packed arrays"
                )

    def __repr__(self) -> str:
        leaves = jax.tree.leaves((self.weights, self.sites))
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        return (
            f"Packed({len(self.weights)} weights, {len(self.sites)} sites, {size / 1e6:.1f} MB, "
            f"plan {self.fingerprint})"
        )
