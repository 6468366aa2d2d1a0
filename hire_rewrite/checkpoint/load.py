"""Read a `Packed` from a file or a directory, for a function.

The function is traced and packed as shapes, with the rules that the checkpoint holds, all of whose
sizes are written out. What comes of it is what the checkpoint has to hold.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.checkpoint.arrays import StoredArray
from hire_rewrite.checkpoint.metadata import (
    Metadata,
    array_names,
    opened,
    read_metadata,
    trees_of,
)
from hire_rewrite.errors import HireRewriteError, is_out_of_memory
from hire_rewrite.origin import Origin, check_specs
from hire_rewrite.packed import Packed, PackedInfo
from hire_rewrite.transformed import Transformed

_LARGE = 2**20
"""Sizes up to here are believed; greater ones if the file has as many bytes."""


def load(
    path: str | os.PathLike[str], step: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Packed:
    """See `Packed.load`."""
    if isinstance(path, Transformed) or not isinstance(step, Transformed):
        raise HireRewriteError(
            f"load: the function is a {type(step).__name__}: give Packed.load(path, step), where "
            "step is what transform returned"
        )
    where, reader = os.fspath(path), opened(path)
    metadata = read_metadata(reader.description, where)
    reader.check(metadata.arrays)
    args, kwargs = _arguments(where, metadata, step, args, kwargs, reader.size)
    target = _target(where, metadata, step, args, kwargs)
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
            f"{where}: the model's arguments are not dicts, lists and tuples alone, whose "
            "structure a checkpoint holds: give them, Packed.load(path, step, *args), arrays or "
            "shapes"
        )
    large = max((n for spec in jax.tree.leaves((weights, call)) for n in spec.shape), default=0)
    if large > max(size, _LARGE):
        raise HireRewriteError(
            f"{where}: it has {size} bytes and tells of an array with {large} numbers along an "
            "axis: give the arguments, Packed.load(path, step, *args), if that is right"
        )
    if len(weights) != len(step.weights) or not isinstance(call, tuple) or len(call) != 2:
        raise HireRewriteError(
            f"{where}: it was packed from {len(weights)} weight arguments, and the function has "
            f"{len(step.weights)}"
        )
    held = dict(zip(step.weights, weights, strict=True))
    rest, by_keyword = call
    try:
        return step._analyses.joined(held, rest), dict(by_keyword)
    except StopIteration:
        raise HireRewriteError(f"{where}: it holds too few arguments") from None


def _target(
    where: str,
    metadata: Metadata,
    step: Transformed,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Packed:
    """The `Packed` of shapes that a checkpoint is to be restored to.

    Raises:
      HireRewriteError: the checkpoint is of another function.
    """
    try:
        known = {(site.kind, site.key): site.statistics for site in metadata.sites}
        shapes = step._packed_shapes(
            metadata.rules, lambda d: known.get((d.site.kind.name, d.site.key)), args, kwargs
        )
        info = _told(shapes.info, metadata)
        _check_arrays(shapes, metadata.arrays)
        target = dataclasses.replace(shapes, info=info)
        step._check_serves(target, args, kwargs)
    except HireRewriteError as error:
        sharded = ""
        if metadata.devices > 1:
            sharded = (
                f" (It was sharded over {metadata.devices} devices: give Packed.load(path, step, "
                "*args) with shapes that have shardings, or transform(mesh=...).)"
            )
        raise HireRewriteError(f"{where}: {error}{sharded}") from error
    except Exception as error:  # of a function at shapes that are not its own
        raise HireRewriteError(
            f"{where}: it was packed for another function: {type(error).__name__}: {error}"
        ) from error
    return target


def _told(info: PackedInfo, metadata: Metadata) -> PackedInfo:
    """What packing shapes told, and what calibration and numbers told when it was packed.

    Raises:
      HireRewriteError: the checkpoint has other sites.
    """
    before = {(site.kind, site.key): site for site in metadata.sites}
    layouts = {(site.kind, site.key, site.layout): site.statistics for site in metadata.sites}
    for site in info.sites:
        if (site.kind, site.key) not in before:
            raise HireRewriteError(
                f"it was packed for another function: this one has {site.name}, which it does not "
                "hold: pack with this function"
            )
        if (site.kind, site.key, site.layout) not in layouts:
            raise HireRewriteError(
                f"{site.name} is stored otherwise than this function would read it, by another "
                "version, or on a mesh of other sizes: pack again"
            )
    if len(layouts) != len(metadata.sites) or len(layouts) != len(info.sites):
        mine = {(site.kind, site.key) for site in info.sites}
        others = [site.name for site in metadata.sites if (site.kind, site.key) not in mine]
        raise HireRewriteError(
            "it was packed for another function: it holds "
            f"{', '.join(f'{name!r:.80}' for name in others[:4]) or 'other sites'}, which this one "
            "does not have: pack with this function"
        )
    here = {(site.kind, site.key, site.layout): site for site in info.sites}
    same_rules = {*info.rules} == {*metadata.rules}
    return dataclasses.replace(
        info,
        origin=dataclasses.replace(info.origin, fingerprint=metadata.fingerprint),
        sites=tuple(
            dataclasses.replace(here[which], statistics=told) for which, told in layouts.items()
        ),
        examined=metadata.examined,
        rules=metadata.rules if same_rules else info.rules,  # in the order that they were in
    )


def _check_arrays(shapes: Packed, arrays: Iterable[StoredArray]) -> None:
    """Raise HireRewriteError if a checkpoint's arrays are not those of a `Packed` of shapes."""
    leaves = jax.tree.leaves(shapes)
    wanted = dict(zip(array_names(shapes), leaves, strict=True))
    stored = {array.name: array for array in arrays}
    for name in [*wanted, *stored]:
        want, found = wanted.get(name), stored.get(name)
        if want is None or found is None or (want.shape, want.dtype) != (found.shape, found.dtype):
            texts = [
                "nothing" if item is None else f"{item.dtype}{list(item.shape)}"
                for item in (found, want)
            ]
            raise HireRewriteError(
                f"{name!r:.200} is {texts[0]} in it, and would be {texts[1]} for this function: "
                "pack again with this function"
            )
    if list(wanted) != list(stored):
        raise HireRewriteError("its arrays are in another order: it is damaged")
