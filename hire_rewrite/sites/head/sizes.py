"""From the rule of a head to the sizes of its operation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.certify.proof import chain_of
from hire_rewrite.ops.certify.rounding import check_product
from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.ops.head.spec import HeadSpec
from hire_rewrite.ops.predictors import Cascade, certifies
from hire_rewrite.ops.top_k.recall import kept_per_shard
from hire_rewrite.rules import candidate_count, count
from hire_rewrite.sites.head.epilogue import epilogue_of
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.head.rule import Head
from hire_rewrite.sites.kind import MatchedSite, Unfit, unfit_if_refused


def head_spec(site: MatchedSite, rule: Head) -> HeadSpec:
    """The sizes that a rule asks for at a head.

    Raises:
      HireRewriteError: the rule asks for more than there is.
      Unfit: the rule cannot be applied to this head.
    """
    match: HeadMatch = site.match
    linear, width, sharding = match.linear, match.width, site.sharding
    for value in match.outputs:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise Unfit(f"its logits are {value.dtype}, and only floating-point ones are chosen")
    k = count(rule.k, width, f"{site.name}: k")
    candidates = candidate_count(site.name, rule, k, min(width, max(256, 4 * k)), width)
    num_shards, predictor = sharding.num_shards, rule.guesses_by
    if num_shards > 1:
        if rule.certify or isinstance(predictor, Cascade):
            what = "proofs are" if rule.certify else f"{predictor} is"
            raise Unfit(f"its rows are sharded over {sharding}, where {what} not supported")
        last = width - (num_shards - 1) * -(-width // num_shards)
        kept = kept_per_shard(width, candidates, num_shards, rule.recall_target)
        if last < kept:
            raise Unfit(
                f"its {width} rows are sharded over {sharding}, which leaves the last device "
                f"{max(0, last)} of them, fewer than the {kept} candidates of each"
            )
        candidates = kept * num_shards
    spec = HeadSpec(
        width=width,
        k=k,
        candidates=candidates,
        tail=rule.tail,
        out_dtype=match.logits.dtype,
        precision=linear.node.params["precision"],
        compute_dtype=linear.weight.dtype,
        starts=tuple(match.places[value][1] for value in match.outputs),
        num_shards=num_shards,
        recall_target=rule.recall_target,
        exact=rule.exact,
        cast=linear.out.dtype != match.logits.dtype,
    )
    if rule.exact is not None:
        _check_exact(site, rule.exact, spec)
    return _certified(site, rule, spec) if rule.certify else spec


def _check_exact(site: MatchedSite, exact: Encoding, spec: HeadSpec) -> None:
    """Raise Unfit if the rows of a head cannot be stored so."""
    sharding = site.sharding
    if sharding.region is not None:
        raise Unfit("it is in a shard_map, which exact= does not support; leave exact out")
    if sharding.mesh is not None and _of_several_processes(sharding.mesh):
        raise Unfit(
            "its rows are sharded over devices of several processes, which exact= does not "
            "support; leave exact out"
        )
    if jnp.float64 in (spec.out_dtype, spec.compute_dtype):
        raise Unfit(
            "it computes in float64, and stored numbers are multiplied in float32; leave exact out"
        )
    with unfit_if_refused():
        exact.check(spec.shard_rows, site.d_model, site=site.name)


def _of_several_processes(mesh: Any) -> bool:
    return isinstance(mesh, Mesh) and len({d.process_index for d in mesh.devices.flat}) > 1


def _certified(site: MatchedSite, rule: Head, spec: HeadSpec) -> HeadSpec:
    """The sizes with proofs.

    Raises:
      HireRewriteError: the predictor has no bound, or fewer logits are exact than are to be proved.
      Unfit: nothing can be proved about this head.
    """
    match: HeadMatch = site.match
    if not certifies(rule.guesses_by):
        raise HireRewriteError(
            f"{site.name}: certify needs a predictor that bounds its errors, and "
            f"{rule.guesses_by} does not: give Quantized(), or leave certify out"
        )
    if int(rule.certify) > spec.k:
        raise HireRewriteError(
            f"{site.name}: certify={rule.certify} of k={rule.k}: only the k greatest logits are "
            "exact, so give at most k, or a greater k"
        )
    if match.disorder is not None:
        raise Unfit(f"certify: {match.disorder}")
    count = int(rule.certify) + match.ranked.forbidden
    if count > spec.k:
        raise Unfit(
            f"certify: {match.ranked.forbidden} of its greatest logits may be taken out behind it, "
            f"so that {count} have to be proved of k={rule.k}: give a greater k"
        )
    sides = {side: jax.ShapeDtypeStruct(side.shape, side.dtype) for side in match.side_inputs}

    def examine(arrays: Any) -> None:
        chain_of(epilogue_of(match, dict(zip(sides, arrays, strict=True))), site.tokens, proved)

    with unfit_if_refused():
        check_product(match.linear.x.dtype, spec.out_dtype, spec.precision)
        proved = dataclasses.replace(spec, certify=count, rounding=match.ranked.rounding)
        jax.eval_shape(examine, list(sides.values()))
    return proved
