"""The arguments of a call: where the weights stand, or the `Packed` in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.packed import Packed

__all__ = ["packed_among", "with_packed", "without_weights"]

_PACKED = {field.name for field in dataclasses.fields(Packed)}


def packed_among(
    name: str, weights: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Packed | None:
    """The `Packed` among the arguments of a function of this name, if there is one.

    Args:
      weights: the positions of its weights; a `Packed` stands at the first.

    Raises:
      HireRewriteError: a position is not there, or a `Packed` stands elsewhere, or something that a
        `Packed` was saved as stands there.
    """
    for position in weights:
        if position >= len(args):
            named = f" (and {', '.join(kwargs)} by keyword)" if kwargs else ""
            raise HireRewriteError(
                f"{name}: weights={position} but the call has {len(args)} positional "
                f"argument(s){named}: give weights by position, and transform their position, "
                "or () if they are closed over"
            )
    first = args[weights[0]] if weights else None
    if isinstance(first, Mapping) and {"weights", "sites"} <= set(first) <= _PACKED:
        raise HireRewriteError(
            f"{name}: argument {weights[0]} is a {type(first).__name__} of `weights` "
            "and `sites`, which a Packed is restored to without a target: give the restoring "
            "call a target, pack(...) of jax.ShapeDtypeStructs in place of the weights"
        )
    misplaced = [i for i, arg in enumerate(args) if isinstance(arg, Packed) and arg is not first]
    if misplaced:
        raise HireRewriteError(
            f"{name}: argument {misplaced[0]} is a Packed, but weights={weights}: it "
            "stands where the first of the weights stood"
        )
    return first if isinstance(first, Packed) else None


def with_packed(args: Sequence[Any], weights: Sequence[int], packed: Packed) -> list[Any]:
    """The arguments of a call on raw weights with a `Packed` in their place: it stands for the
    first, and None for the others."""
    held = list(args)
    for place, position in enumerate(weights):
        held[position] = packed if place == 0 else None
    return held


def without_weights(args: Sequence[Any], weights: Sequence[int]) -> tuple[Any, ...]:
    """The arguments of a call that hold no weights, in order: what a batch is."""
    return tuple(arg for i, arg in enumerate(args) if i not in weights)
