"""The arguments of a call: where the weights stand, or the `Packed` in their place."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.trace import argument_names, holds_numbers
from hire_rewrite.packed import Packed

__all__ = [
    "check_call",
    "check_numbers",
    "check_to_pack",
    "not_traced",
    "packed_among",
    "with_packed",
    "without_weights",
]

_PACKED = {field.name for field in dataclasses.fields(Packed)}


def packed_among(
    name: str, weights: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Packed | None:
    """The `Packed` among the arguments of a function of this name, if there is one.

    Args:
      weights: the positions of its weights; a `Packed` stands at the first.

    Raises:
      HireRewriteError: a position is not there, or a `Packed` stands elsewhere.
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
    misplaced = [i for i, arg in enumerate(args) if isinstance(arg, Packed) and arg is not first]
    if misplaced:
        raise HireRewriteError(
            f"{name}: argument {misplaced[0]} is a Packed, but weights={weights}: it "
            "stands where the first of the weights stood"
        )
    if not isinstance(first, Packed):
        return None
    others = [i for i in weights[1:] if args[i] is not None]
    if others:
        raise HireRewriteError(
            f"{name}: argument {others[0]} is {_written(args[others[0]])} beside a Packed, which "
            f"stands for all of weights={weights}: give None there, and for other weights the "
            "Packed that is made of them"
        )
    return first


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


def check_call(
    fn: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise HireRewriteError if arguments are missing or are too many for a function."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # it does not tell
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise HireRewriteError(
            f"{name}: {error}: the arguments of {name}{signature} are to be given, the weights and "
            f"all others; there are {len(args)} by position"
            + (f" and {', '.join(kwargs)} by keyword" if kwargs else "")
        ) from error


def check_numbers(
    fn: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise HireRewriteError if an argument of a call holds something that is not an array."""
    named = zip(argument_names(fn, len(args)), args, strict=True)
    for where, argument in (*named, *kwargs.items()):
        for leaf in jax.tree.leaves(argument):
            if holds_numbers(leaf):
                continue
            verb = "is" if leaf is argument else "holds"
            remedy = "give an array, or close over it (with functools.partial, say)"
            if isinstance(leaf, jax.ShapeDtypeStruct):
                remedy = "give an array (plan, diff, pack and jax.eval_shape take shapes)"
            raise HireRewriteError(
                f"{name}: argument `{where}` {verb} a {type(leaf).__name__}, which "
                f"has no numbers to compute with: {remedy}"
            )


def check_to_pack(name: str, leaves: Sequence[Any], calibrated: bool) -> bool:
    """Whether the weights to pack are shapes.

    Raises:
      HireRewriteError: some are and others are not, or one has an axis without a number, or they
        are to be calibrated.
    """
    sizes = (size for leaf in leaves for size in getattr(leaf, "shape", ()))
    if symbol := next(filter(jax.export.is_symbolic_dim, sizes), None):
        raise HireRewriteError(
            f"{name}: pack has a weight with an axis of size {symbol!s}: give weights "
            "whose sizes are numbers, and symbols in the other arguments alone"
        )
    shapes = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    if shapes and (calibrated or len(shapes) < len(leaves)):
        what = "calibration" if calibrated else "other weights that are arrays"
        raise HireRewriteError(
            f"{name}: pack has shapes for weights, and {what}: give arrays for all "
            "weights, or shapes for all and no calibration"
        )
    return bool(shapes)


def not_traced(
    fn: Callable[..., Any],
    error: Exception,
    args: Sequence[Any],
    weights: Sequence[int],
    packed: bool,
) -> str | None:
    """What a user should look at where a function raises an error when it is traced; None if
    nothing is known beside the error.

    Args:
      args: arrays or shapes; where there is a `Packed`, what it was made of.
      packed: whether there is one.
    """
    for i in weights:
        if isinstance(args[i], Mapping) and {"weights", "sites"} <= set(args[i]) <= _PACKED:
            return (
                f"argument {i} is a {type(args[i]).__name__} of `weights` and `sites`, which a "
                "Packed is restored to without a target: give the restoring call a target, "
                "pack(...) of jax.ShapeDtypeStructs in place of the weights"
            )
    names = argument_names(fn, len(args))
    said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    holders = [i for i, arg in enumerate(args) if i not in weights and _has_matrix(arg)]
    if weights and not any(_has_matrix(args[i]) for i in weights) and holders:
        first, other = weights[0], holders[0]
        return (
            f"argument {first} `{names[first]}` is {_written(args[first])}, which is to hold the "
            f"weights and holds no matrix, but argument {other} `{names[other]}` does ({said}): "
            "give the arguments in the function's order, or transform(..., weights=) their places"
        )
    if packed:
        given = [f"`{names[i]}` {_written(a)}" for i, a in enumerate(args) if i not in weights]
        return (
            f"the function raised {said}. It was called with {', '.join(given) or 'no others'} "
            "beside the Packed: look at these first. Pack again if the function's weights have "
            "other shapes than those that the Packed was made of"
        )
    return None


def _has_matrix(argument: Any) -> bool:
    return any(
        len(leaf.shape) > 1 and jnp.issubdtype(leaf.dtype, jnp.inexact)
        for leaf in jax.tree.leaves(argument)
    )


def _written(argument: Any) -> str:
    """An argument as a message has it: `int32[1]`, or the type of a tree."""
    if isinstance(argument, jax.ShapeDtypeStruct | jax.Array):
        return f"{argument.dtype}{list(argument.shape)}"
    return f"a {type(argument).__name__} of {len(jax.tree.leaves(argument))} arrays"
