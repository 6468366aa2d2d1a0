"""Match rules with sites: what is rewritten, with which sizes, and why the rest is not."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Hashable, Sequence

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.ffn import FFNSpec
from hire_rewrite.ops.head import HeadSpec
from hire_rewrite.passes.detect import Detection, Found, source_of
from hire_rewrite.passes.estimate import dense_bytes, estimate
from hire_rewrite.patterns.activation import Activation
from hire_rewrite.patterns.ffn import FFNMatch
from hire_rewrite.patterns.head import HeadMatch
from hire_rewrite.plan import Plan, Site
from hire_rewrite.rules import FFN, Head, Rule, count

__all__ = ["DEFAULT_RULES", "Decision", "decide", "min_width"]

DEFAULT_RULES: tuple[Rule, ...] = (Head(), FFN(k=0.05))
"""What is done without rules; the FFN rule then applies to sites that are sparse by themselves."""


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """A site with the rule and the sizes that were decided for it.

    Attributes:
      packs: whether the site's weights are packed: a rule asks for it, and it pays for one token.
        (Whether it is rewritten in a given call depends on that call's tokens as well.)
      state: the name under which they are packed: the first site's with the same weights, so
        that a weight that is used several times is packed once.
    """

    found: Found
    site: Site
    spec: FFNSpec | HeadSpec | None
    packs: bool
    state: str

    @property
    def rewritten(self) -> bool:
        return self.site.status == "rewritten"


def min_width(rules: Sequence[Rule]) -> int:
    """The least width at which a linear layer may be a vocabulary for one of the rules."""
    return min((rule.min_width for rule in rules if isinstance(rule, Head)), default=Head.min_width)


def decide(detection: Detection, rules: Sequence[Rule]) -> tuple[Plan, tuple[Decision, ...]]:
    """The plan of a function.

    Args:
      rules: the user's, in order; none stands for `DEFAULT_RULES`.

    Raises:
      HireRewriteError: a rule asks for more rows than a site has.
    """
    default = not rules
    rules = rules or DEFAULT_RULES
    decisions = []
    used: set[int] = set()
    for found in detection.found:
        number = next((i for i, r in enumerate(rules) if _fits(r, found, default)), None)
        if number is None:
            decisions.append(_without_rule(found))
            continue
        used.add(number)
        decisions.append(_with_rule(found, rules[number], default))
    unused = () if default else tuple(r for i, r in enumerate(rules) if i not in used)
    decisions = _sharing(decisions)
    plan = Plan(
        tuple(decision.site for decision in decisions),
        detection.rejected,
        detection.opaque,
        unused,
    )
    return plan, tuple(decisions)


def _sharing(decisions: Sequence[Decision]) -> list[Decision]:
    first: dict[Hashable, str] = {}
    shared = []
    for decision in decisions:
        key = (decision.found.weights, decision.spec, decision.site.rule)
        name = first.setdefault(key, decision.found.name) if decision.packs else decision.state
        shared.append(dataclasses.replace(decision, state=name))
    return shared


def _fits(rule: Rule, found: Found, default: bool) -> bool:
    match = found.match
    if rule.path is not None and re.search(rule.path, found.name) is None:
        return False
    if isinstance(match, FFNMatch):
        return isinstance(rule, FFN) and (not default or match.activation.sparse)
    return isinstance(rule, Head) and match.width >= rule.min_width


def _without_rule(found: Found) -> Decision:
    match = found.match
    if not isinstance(match, FFNMatch):
        reason = "no rule asks for it; Head(k=...) does"
    elif match.activation.sparse:
        reason = f"no rule asks for it; FFN(k=...) does ({match.activation.name} is sparse)"
    else:
        reason = (
            f"{match.activation.name} zeroes no neuron, so a top-k changes a model that was not "
            "trained with one; ask with FFN(k=...)"
        )
    return Decision(found, _site(found, None, "dense", reason), None, False, found.name)


def _with_rule(found: Found, rule: Rule, default: bool) -> Decision:
    if found.obstacle is not None:
        site = _site(found, rule, "dense", found.obstacle)
        return Decision(found, site, None, False, found.name)
    spec = _spec(found, rule, default)
    scored = _scored_rows(found)
    rule.predictor.check(*scored, site=found.name)
    now = estimate(found, spec, rule.predictor, found.tokens)
    single = estimate(found, spec, rule.predictor, 1)
    packs = single.pays or rule.force
    if rule.max_tokens is not None and found.tokens > rule.max_tokens:
        status = "dense"
        reason = f"{found.tokens} tokens are more than max_tokens={rule.max_tokens}"
    elif not now.pays and not rule.force:
        status = "dense"
        reason = (
            f"would read {now.after / 1e6:.1f} MB instead of {now.before / 1e6:.1f}: ask for fewer "
            "candidates or a smaller predictor, or give force=True"
        )
    else:
        status, reason = "rewritten", _describe(spec, rule)
    if status == "dense" and packs:
        reason += "; the same top-k in dense arithmetic"
    after = now.after if status == "rewritten" else None
    return Decision(found, _site(found, rule, status, reason, after), spec, packs, found.name)


def _describe(spec: FFNSpec | HeadSpec, rule: Rule) -> str:
    if isinstance(spec, FFNSpec):
        k, candidates = spec.k_groups * spec.group, spec.candidate_groups * spec.group
        what = f"top {k} of {candidates} candidates of {spec.width}, in groups of {spec.group}"
    else:
        what = f"top {spec.k} of {spec.candidates} candidates of {spec.width}"
    hint = " (calibrate it in pack)" if rule.predictor.wants_calibration else ""
    return f"{what}, guessed by {rule.predictor}{hint}"


def _spec(found: Found, rule: Rule, default: bool) -> FFNSpec | HeadSpec:
    if isinstance(found.match, FFNMatch):
        assert isinstance(rule, FFN)
        return _ffn_spec(found.name, found.match, rule, default)
    assert isinstance(rule, Head)
    return _head_spec(found.name, found.match, rule)


def _own_k(activation: Activation, width: int) -> int:
    """The k that a block's own selection asks for; a statistic selects about that many."""
    assert activation.keeps is not None
    return min(width, activation.keeps if activation.name == "topk" else 2 * activation.keeps)


def _ffn_spec(name: str, match: FFNMatch, rule: FFN, default: bool) -> FFNSpec:
    width, up, activation = match.region.size, match.linears[0], match.activation
    own = activation.keeps if default else None
    group = math.gcd(rule.group, width) if own is None else 1
    k = count(rule.k, width, f"{name}: k") if own is None else _own_k(activation, width)
    candidates = _candidates(name, rule, k, min(width, 2 * k), width)
    return FFNSpec(
        width=width,
        group=group,
        projections=len(match.region.projections),
        k_groups=-(-k // group),
        candidate_groups=-(-candidates // group),
        gate=activation.gate if activation.sparse else None,
        gate_bias=activation.gate_bias if activation.sparse else None,
        up_dtype=up.out.dtype,
        down_dtype=match.down.out.dtype,
        precision=up.node.params["precision"],
        compute_dtype=up.weight.dtype,
        selects=activation.keeps is not None,
    )


def _head_spec(name: str, match: HeadMatch, rule: Head) -> HeadSpec:
    linear, width = match.linear, match.width
    k = count(rule.k, width, f"{name}: k")
    return HeadSpec(
        width=width,
        k=k,
        candidates=_candidates(name, rule, k, min(width, max(256, 4 * k)), width),
        tail=rule.tail,
        out_dtype=linear.out.dtype,
        precision=linear.node.params["precision"],
        compute_dtype=linear.weight.dtype,
        starts=tuple(match.places[value][1] for value in match.endpoints),
    )


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


def _scored_rows(found: Found) -> tuple[int, int]:
    """Rows and columns of the matrix whose products the predictor guesses."""
    match = found.match
    if isinstance(match, FFNMatch):
        return len(match.region.projections) * match.region.size, match.linears[0].in_dim
    return match.width, match.linear.in_dim


def _site(
    found: Found, rule: Rule | None, status: str, reason: str, after: int | None = None
) -> Site:
    match = found.match
    before = dense_bytes(found)
    return Site(
        name=found.name,
        kind=found.kind,
        d_model=match.linears[0].in_dim,
        width=match.region.size if isinstance(match, FFNMatch) else match.width,
        gated=isinstance(match, FFNMatch) and len(match.region.projections) > 1,
        activation=match.activation.name if isinstance(match, FFNMatch) else "",
        repeats=found.repeats,
        experts=found.experts,
        tokens=found.tokens,
        rule=rule,
        status=status,
        reason=reason,
        bytes_before=before,
        bytes_after=before if after is None else after,
        source=source_of(match.linears[-1].node),
    )
