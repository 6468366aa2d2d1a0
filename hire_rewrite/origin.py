"""What a `Packed` was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.fingerprint import fingerprint
from hire_rewrite.graph.trace import abstract
from hire_rewrite.names import first_names, unique


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a `Packed` was made from.

    Two that differ in `call` or fingerprints alone are equal: programs compiled for one serve the
    other.

    Attributes:
      tree: the structure of the tuple of weight arguments.
      paths, specs: of each weight the path, and the shape, dtype and sharding.
      call: shapes of the call that it was packed for: the other arguments, and those by keyword.
      fingerprint: of the weights, as `fingerprint.fingerprint` has it; None where the numbers were
        not known.
      packed: the fingerprint of what they were packed to.
    """

    tree: Any
    paths: tuple[str, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]
    call: Any = dataclasses.field(default=None, compare=False, repr=False)
    fingerprint: tuple[int | None, ...] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    packed: tuple[int | None, ...] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @property
    def argument(self) -> str | None:
        """The name of the argument that held them; None if there were several."""
        if self.tree.num_leaves == 0 or len(self.tree.children()) != 1:
            return None
        return self.paths[0].partition("/")[0]


def check_origin(
    origin: Origin, packed: Sequence[Any], weights: Sequence[Any], *, known: bool = True
) -> None:
    """Raise HireRewriteError if weight arguments are not those that a `Packed` was made from.

    Args:
      packed: the arrays of the `Packed`.
      known: whether it is an error that nobody knows, as it was packed in a trace.
    """
    check_specs(origin, weights)
    leaves = jax.tree.leaves(tuple(weights))
    if any(isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) for leaf in leaves):
        raise HireRewriteError(
            "the weights are shapes, or are traced, and have no numbers to compare with those that "
            "were packed: give arrays, outside of jit"
        )
    if origin.fingerprint is None or fingerprint(packed) != origin.packed:
        if not known:
            return
        raise HireRewriteError(
            "the Packed does not know the numbers that its arrays were packed from, as it was "
            "packed or passed on in a trace, or given other arrays: pack outside of jit to have it "
            "checked, and restore what was saved with Packed.load"
        )
    found = fingerprint(leaves)
    for path, before, now in zip(origin.paths, origin.fingerprint, found, strict=True):
        if before != now:
            raise HireRewriteError(
                f"{path} has changed since it was packed: pack again with the weights as they are"
            )


def check_specs(origin: Origin, weights: Sequence[Any]) -> None:
    """Raise HireRewriteError if weight arguments, arrays or shapes, have another structure, shape
    or dtype than those that a `Packed` was made from. Names of arguments may differ."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tuple(weights))
    what = "the Packed was made of other weights"
    if len(leaves) != len(origin.specs):
        raise HireRewriteError(
            f"{what}: of {len(origin.specs)} arrays ({first_names(origin.paths)}), and these are "
            f"{len(leaves)}: pack again for this model"
        )
    keys = [jax.tree_util.keystr(k[1:], simple=True, separator="/") for k, _ in leaves]
    heads = [path.partition("/")[0] for path in origin.paths]
    here = unique(
        [
            f"{head}/{key}" if len(path) > 1 else head
            for head, key, (path, _) in zip(heads, keys, leaves, strict=True)
        ]
    )
    for i, (path, want, (_, leaf)) in enumerate(
        zip(origin.paths, origin.specs, leaves, strict=True)
    ):
        try:
            spec = abstract(leaf)
        except TypeError as error:
            raise HireRewriteError(f"{what}: {path} is none here: {error}") from error
        if here[i] != path:
            raise HireRewriteError(
                f"{what}: of {path}, where these have {keys[i] or 'one array'}: pack again for "
                "this model"
            )
        if (spec.shape, spec.dtype) != (want.shape, want.dtype):
            raise HireRewriteError(
                f"{what}: {path} was {want.dtype}{list(want.shape)} and is "
                f"{spec.dtype}{list(spec.shape)}: pack again for this model"
            )
