"""Read a `Packed` from a file or a directory, for a function.

The function is traced and packed as shapes, with the rules that the checkpoint holds, all of whose
sizes are written out. What comes of it is what the checkpoint has to hold.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.checkpoint.metadata import Metadata, opened, read_metadata, trees_of
from hire_rewrite.checkpoint.target import target_of
from hire_rewrite.errors import HireRewriteError, is_out_of_memory
from hire_rewrite.files import local
from hire_rewrite.origin import Origin, check_specs
from hire_rewrite.packed import Packed
from hire_rewrite.transformed import Transformed

_LENGTH = 4096
"""Sizes along an axis up to here are believed, whatever the file has."""


def load(
    path: str | os.PathLike[str], step: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Packed:
    """See `Packed.load`."""
    if isinstance(path, Transformed) or not isinstance(step, Transformed):
        raise HireRewriteError(
            f"load: the function is a {type(step).__name__}: give Packed.load(path, step), where "
            "step is what transform returned"
        )
    where = local("load", path)
    # A guard against transfers is for what a program does at each call.
    with jax.transfer_guard("allow"), opened(where) as reader:
        metadata = read_metadata(reader.description, where)
        reader.check(metadata.arrays)
        args, kwargs = _arguments(where, metadata, step, args, kwargs, reader.size)
        target = target_of(where, metadata, step, args, kwargs)
        shardings = [leaf.sharding for leaf in jax.tree.leaves(target)]
        try:
            return step._restored(target, reader.arrays(metadata.arrays, shardings))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise HireRewriteError(
                f"{where}: memory does not suffice to load it ({error}): nothing of it is kept"
            ) from error.with_traceback(None)


def _arguments(
    where: str,
    metadata: Metadata,
    step: Transformed,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    size: int,
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of the call that is packed as shapes.

    Args:
      size: bytes of the checkpoint.

    Raises:
      HireRewriteError: they are needed, or are of another model.
    """
    origin = Origin(None, metadata.paths, metadata.specs)
    try:
        weights, call = trees_of(metadata)
        if weights is not None:
            check_specs(origin, weights)
        if call is not None and not _is_call(call):
            raise ValueError("it holds no call's arguments")
        untrusted = _untrusted(weights, call, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise HireRewriteError(f"{where}: its description is damaged: {error!r:.300}") from error
    if args or kwargs:
        missing = [i for i in step.weights if i >= len(args)]
        if missing:
            raise HireRewriteError(
                f"load: there are {len(args)} arguments, and weights={step.weights}: give those of "
                "a call, as for pack, or none"
            )
        try:
            check_specs(origin, [args[i] for i in step.weights])
        except HireRewriteError as error:
            raise HireRewriteError(f"{where}: {error}") from error
        return args, kwargs
    if weights is None or call is None:
        raise HireRewriteError(
            f"{where}: the model's arguments are not dicts, lists and tuples alone, or lie more "
            "than 16 deep in them, so that the checkpoint does not hold their structure: give "
            "them, Packed.load(path, step, *args), arrays or shapes"
        )
    if untrusted is not None:
        raise HireRewriteError(
            f"{where}: it has {size} bytes and tells of {untrusted}, for which the function would "
            "be traced: give the arguments, Packed.load(path, step, *args), if that is right"
        )
    if len(weights) != len(step.weights):
        raise HireRewriteError(
            f"{where}: it was packed from {len(weights)} weight arguments, and the function has "
            f"{len(step.weights)}"
        )
    held = dict(zip(step.weights, weights, strict=True))
    rest, by_keyword = call
    try:
        return step._analyses.joined(held, rest), by_keyword
    except HireRewriteError as error:
        raise HireRewriteError(f"{where}: {error}") from error


def _untrusted(weights: Any, call: Any, size: int) -> str | None:
    """What is too large to be believed of a checkpoint with so many bytes; None if nothing is.

    The function's own Python may allocate what it is traced for, and of a length its square: a
    mask. Weights lie in the checkpoint, in whatever form.
    """
    believed = max(size, _LENGTH**2)
    for spec in jax.tree.leaves(weights):
        if max(spec.shape, default=0) > max(size, _LENGTH):
            return f"a weight with {max(spec.shape)} numbers along an axis"
    for spec in jax.tree.leaves(call):
        if max(spec.shape, default=0) ** 2 > believed:
            return f"a call's argument with {max(spec.shape)} numbers along an axis"
        if math.prod(spec.shape) > believed:
            return f"a call's argument with {math.prod(spec.shape)} numbers"
    return None


def _is_call(call: Any) -> bool:
    """Whether it is a tuple of arguments, and a dict of those by keyword."""
    if not isinstance(call, tuple) or [*map(type, call)] != [tuple, dict]:
        return False
    return all(isinstance(name, str) for name in call[1])
