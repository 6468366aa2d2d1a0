"""The `Packed` of shapes that a checkpoint is restored to: what the function makes of shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.arguments import with_packed
from hire_rewrite.checkpoint.arrays import StoredArray
from hire_rewrite.checkpoint.metadata import Metadata, array_names
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.trace import placed, sharding_over_mesh
from hire_rewrite.packed import Packed
from hire_rewrite.packed_info import PackedInfo
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.misses import absent_sites
from hire_rewrite.passes.rewrite import rewrite_for
from hire_rewrite.plan import Plan
from hire_rewrite.rules import Rule
from hire_rewrite.sites.linear.rule import Linear
from hire_rewrite.transformed import Transformed

_NOTHING = Linear(path=r"(?!)")
"""A rule that asks for no site. (Without rules there are default ones.)"""


def target_of(
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
        shapes, plan = _packed_shapes(
            step, metadata.rules, lambda d: known.get((d.site.kind.name, d.site.key)), args, kwargs
        )
        info = _told(shapes.info, metadata, plan)
        _check_arrays(shapes, metadata.arrays)
        target = dataclasses.replace(shapes, info=info)
        _check_serves(step, target, args, kwargs)
    except HireRewriteError as error:
        raise HireRewriteError(f"{where}: {error}{_of_devices(metadata, step, args)}") from error
    except Exception as error:  # of a function at shapes that are not its own
        raise HireRewriteError(
            f"{where}: it was packed for another function: {type(error).__name__}: {error}"
        ) from error
    return target


def _of_devices(metadata: Metadata, step: Transformed, args: Sequence[Any]) -> str:
    """What to do about a checkpoint that was sharded."""
    if metadata.devices == 1:
        return ""
    leaves = jax.tree.leaves([args[i] for i in step.weights if i < len(args)])
    if any(map(sharding_over_mesh, leaves)):
        return (
            f" (It was packed on {metadata.devices} devices. What is divided among devices is "
            "packed for so many parts: on a mesh that makes others, pack again.)"
        )
    return (
        f" (It was sharded over {metadata.devices} devices: give Packed.load(path, step, *args) "
        "with shapes that have shardings, or transform(mesh=...).)"
    )


def _told(info: PackedInfo, metadata: Metadata, plan: Plan) -> PackedInfo:
    """What packing shapes told, and what calibration and numbers told when it was packed.

    Args:
      plan: of the call with shapes.

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
        dense = [site for site in plan.sites if site.name in others and site.status == "dense"]
        if dense:
            raise HireRewriteError(
                "it was packed for other arguments, or for another function: it holds "
                f"{dense[0].name!r:.80}, which stays dense in this call: {dense[0].reason}"
            )
        raise HireRewriteError(
            "it was packed for another function: it holds "
            f"{', '.join(f'{name!r:.80}' for name in others[:4]) or 'other sites'}, which this one "
            "does not have: pack with this function"
        )
    here = {(site.kind, site.key, site.layout): site for site in info.sites}
    same_rules = {*info.rules} == {*metadata.rules}
    return dataclasses.replace(
        info,
        origin=dataclasses.replace(
            info.origin, fingerprint=metadata.fingerprint, packed=metadata.packed
        ),
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


def _packed_shapes(
    step: Transformed,
    rules: tuple[Rule, ...],
    told: Callable[[Decision], Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Packed, Plan]:
    """The `Packed` of shapes of a call with arrays or shapes, and the plan for it.

    Args:
      rules: those that sites are packed by.
      told: what calibration, or a look at its numbers, told about a site; None for nothing.
    """
    analyses = step._analyses.again(rules or (_NOTHING,))
    analysis = analyses.of(None, args, kwargs)
    known = {d.site.label: statistics for d in analysis.decisions if (statistics := told(d))}
    if known:
        analysis = analyses.of(None, args, kwargs, known)
    analysis.check_decided()
    shapes = [placed(leaf) for leaf in step._weight_leaves(args)]
    return analysis.pack(shapes), analysis.plan


def _check_serves(
    step: Transformed, packed: Packed, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise HireRewriteError if a `Packed`, of arrays or shapes, does not serve a call.

    Args:
      args: the arguments of the call on weights.
    """
    held = tuple(with_packed(args, step.weights, packed))
    analyses = step._analyses
    analysis = analyses.of(packed, held, kwargs)
    for _, absent in absent_sites(analysis.decisions):
        raise HireRewriteError(absent)
    rest = analyses.without_weights(held, packed)
    swaps = analysis.replacements(packed, step.mode.packed)
    rewrite_for(analysis.trace, swaps, analysis.inputs(packed, rest, kwargs), step.name)
