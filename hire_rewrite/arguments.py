"""The arguments of a call: where the weights stand, or the `Packed` in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.packed import Packed

__all__ = ["packed_among"]

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
