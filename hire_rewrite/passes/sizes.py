"""From a rule and what was found to the sizes of the operation that takes its place."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.learned import Learned
from hire_rewrite.ops.certify.proof import chain_of
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.ffn.sharded import Spread
from hire_rewrite.ops.head.head import HeadSpec
from hire_rewrite.ops.predictors import Cascade, certifies
from hire_rewrite.ops.top_k.recall import kept_per_shard
from hire_rewrite.passes.detect import Found
from hire_rewrite.rules import FFN, Head, Rule, count
from hire_rewrite.sites.ffn.activation import Activation
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.head.epilogue import endpoints_of
from hire_rewrite.sites.head.match import HeadMatch

__all__ = ["Unfit", "budget_of", "scored_rows", "spec_of"]


class Unfit(Exception):  # noqa: N818 - no error of the user's: the site stays dense
    """A rule that cannot be applied to a site, and why."""


def spec_of(found: Found, rule: Rule, default: bool, learned: Learned | None) -> FFNSpec | HeadSpec:
    """The sizes that a rule asks for at a site.

    Args:
      default: whether the rule is a default one; blocks that select by themselves keep their k.
      learned: what calibration told about the site; with `k="auto"` its k.

    Raises:
      HireRewriteError: the rule asks for more than there is.
      Unfit: the rule cannot be applied to this site.
    """
    match = found.match
    if isinstance(match, FFNMatch):
        assert isinstance(rule, FFN)
        _check_fits(rule, match)
        if learned is not None and learned.k is not None:
            rule = _with_k(found.name, rule, learned.k, match.region.size)
        return _ffn_spec(found.name, match, rule, default, found.spread)
    assert isinstance(rule, Head)
    spec = _head_spec(found.name, match, rule, found.spread)
    return _certified(found, rule, spec) if rule.certify else spec


def _with_k(name: str, rule: FFN, k: int, width: int) -> FFN:
    """A rule with the k that calibration found, and at least as many candidates."""
    if rule.candidates is None:
        return dataclasses.replace(rule, k=k)
    return dataclasses.replace(
        rule, k=k, candidates=max(k, count(rule.candidates, width, f"{name}: candidates"))
    )


def _check_fits(rule: FFN, match: FFNMatch) -> None:
    """Raise Unfit if a block could be rewritten by another rule, but not by this one."""
    activation = match.activation
    if rule.criterion == "gate" and activation.name in ("custom", "bilinear"):
        raise Unfit(
            f'criterion="gate", but no projection of {activation.name} is known to be the gate'
        )
    if rule.criterion == "gate" and activation.keeps is not None:
        raise Unfit('criterion="gate" is not supported where the function itself selects')
    if rule.criterion == "output" and match.experts > 1:
        raise Unfit('criterion="output" is not supported for experts; give "hidden" or "gate"')
    if rule.common and (activation.keeps is not None or match.experts > 1):
        raise Unfit(
            "common neurons are not supported where the function itself selects, or for experts; "
            "give common=0"
        )


def _own_k(activation: Activation, width: int) -> int:
    """The k that a block's own selection asks for; a statistic selects about that many."""
    assert activation.keeps is not None
    return min(width, activation.keeps if activation.name == "topk" else 2 * activation.keeps)


def _ffn_spec(
    name: str, match: FFNMatch, rule: FFN, default: bool, spread: Spread | None
) -> FFNSpec:
    assert not isinstance(rule.k, str)
    width, up, activation = match.region.size, match.linears[0], match.activation
    own = activation.keeps if default else None
    parts = _parts(name, width, rule.parts, spread)
    if parts > 1 and (rule.common or activation.keeps is not None):
        raise Unfit(
            f"{parts} parts are not supported with common neurons, or where the function itself "
            "selects"
        )
    k = count(rule.k, width, f"{name}: k") if own is None else _own_k(activation, width)
    group = math.gcd(rule.group, width // parts) if own is None else 1
    if parts > 1:  # so that k is not rounded up by much
        group = math.gcd(group, -(-k // parts))
    candidates = _candidates(name, rule, k, min(width, 2 * k), width)
    common = count(rule.common, width, f"{name}: common") if rule.common else 0
    if common > candidates:
        raise HireRewriteError(
            f"{name}: common={rule.common} are {common} neurons, more than the {candidates} "
            "candidates that they are among: give fewer, or more candidates"
        )
    return FFNSpec(
        width=width,
        group=group,
        projections=len(match.region.projections),
        k_groups=-(-k // (group * parts)) * parts,
        candidate_groups=-(-candidates // (group * parts)) * parts,
        up_dtype=up.out.dtype,
        down_dtype=match.down.out.dtype,
        precision=up.node.params["precision"],
        compute_dtype=up.weight.dtype,
        gate=activation.gate,
        sparse=activation.sparse,
        gate_bias=activation.gate_bias if activation.sparse else None,
        selects=activation.keeps is not None,
        criterion=rule.criterion,
        reduction=rule.reduction,
        selection=rule.selection,
        common_groups=min(-(-common // group), -(-candidates // group)),
        parts=parts,
    )


def _parts(name: str, width: int, asked: int | None, spread: Spread | None) -> int:
    """Into how many parts neurons are divided: those of the devices, unless the rule says."""
    devices = 1 if spread is None else spread.parts
    parts = asked or devices
    if parts % devices:
        raise HireRewriteError(
            f"{name}: parts={parts}, but its rows are spread over {devices} devices: give that "
            "number, or None"
        )
    if parts != devices and devices > 1:
        raise Unfit(f"parts={parts} on {devices} devices are not supported; give parts={devices}")
    if width % parts and asked:
        raise HireRewriteError(
            f"{name}: parts={parts} does not divide the width {width}: give a divisor"
        )
    if width % parts:
        raise Unfit(f"its {width} neurons cannot be divided among {parts} devices alike")
    return parts


def _head_spec(name: str, match: HeadMatch, rule: Head, spread: Spread | None) -> HeadSpec:
    linear, width = match.linear, match.width
    k = count(rule.k, width, f"{name}: k")
    candidates = _candidates(name, rule, k, min(width, max(256, 4 * k)), width)
    parts = 1 if spread is None else spread.parts
    if parts > 1:
        last = width - (parts - 1) * -(-width // parts)
        if rule.certify or isinstance(rule.predictor, Cascade):
            what = "proofs are" if rule.certify else f"{rule.predictor} is"
            raise Unfit(f"its rows are spread over {spread}, where {what} not supported")
        each = kept_per_shard(width, candidates, parts, rule.recall_target)
        if last < each:
            raise Unfit(
                f"its {width} rows are spread over {spread}, which leaves the last device "
                f"{max(0, last)} of them, fewer than the {each} candidates of each"
            )
        candidates = each * parts
    return HeadSpec(
        width=width,
        k=k,
        candidates=candidates,
        tail=rule.tail,
        out_dtype=linear.out.dtype,
        precision=linear.node.params["precision"],
        compute_dtype=linear.weight.dtype,
        starts=tuple(match.places[value][1] for value in match.endpoints),
        parts=parts,
        recall_target=rule.recall_target,
    )


def _certified(found: Found, rule: Head, spec: HeadSpec) -> HeadSpec:
    """The spec with proofs.

    Raises:
      HireRewriteError: the predictor has no bound, or fewer logits are exact than are to be proved.
      Unfit: nothing can be proved about this head.
    """
    match = found.match
    assert isinstance(match, HeadMatch)
    if not certifies(rule.predictor):
        raise HireRewriteError(
            f"{found.name}: certify needs a predictor that bounds its errors, and {rule.predictor} "
            "does not: give Quantized(), or leave certify out"
        )
    if int(rule.certify) > spec.k:
        raise HireRewriteError(
            f"{found.name}: certify={rule.certify} of k={rule.k}: only the k greatest logits are "
            "exact, so give at most k, or a greater k"
        )
    try:
        proved = dataclasses.replace(spec, certify=int(rule.certify))
        sides = {side: jax.ShapeDtypeStruct(side.shape, side.dtype) for side in match.sides}

        def examined(arrays: Any) -> None:
            known = dict(zip(sides, arrays, strict=True))
            chain_of(endpoints_of(match, known), found.tokens, proved)

        jax.eval_shape(examined, list(sides.values()))
    except HireRewriteError as error:
        raise Unfit(str(error)) from error
    return proved


def _candidates(name: str, rule: Rule, k: int, default: int, width: int) -> int:
    if rule.candidates is None:
        return default
    candidates = count(rule.candidates, width, f"{name}: candidates")
    if candidates < k:
        raise HireRewriteError(
            f"{name}: candidates={rule.candidates} are {candidates} rows, less than the {k} of "
            f"k={rule.k}: the k are chosen among the candidates, so give at least as many"
        )
    return candidates


def scored_rows(spec: FFNSpec | HeadSpec) -> int:
    """Rows of the matrix whose products the predictor guesses."""
    return spec.scored_rows if isinstance(spec, FFNSpec) else spec.rows


def budget_of(found: Found, spec: FFNSpec | HeadSpec, rule: Rule) -> int | None:
    """Groups that all tokens of a call fetch together, at most; None for no limit."""
    if not isinstance(spec, FFNSpec) or not isinstance(rule, FFN) or rule.budget is None:
        return None
    return -(-count(rule.budget, spec.width, f"{found.name}: budget") // spec.group)
