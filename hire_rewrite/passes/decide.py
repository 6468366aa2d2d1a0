"""Match rules with sites: what is rewritten, with which sizes, and why the rest is not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Mapping, Sequence

from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.estimate import dense_bytes, estimate
from hire_rewrite.cost.machine import Machine
from hire_rewrite.learned import Learned
from hire_rewrite.ops import kernels
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.head.head import HeadSpec
from hire_rewrite.ops.top_k.merge import cheapest, described
from hire_rewrite.passes.detect import Detection, Found, source_of
from hire_rewrite.passes.sizes import Unfit, budget_of, scored_rows, spec_of
from hire_rewrite.plan import Plan, Site
from hire_rewrite.rules import FFN, Head, Rule
from hire_rewrite.sites.ffn.match import FFNMatch

__all__ = ["DEFAULT_RULES", "Decision", "decide", "min_width"]

DEFAULT_RULES: tuple[Rule, ...] = (Head(), FFN(k=0.05))
"""What is done without rules; the FFN rule then applies to sites that are sparse by themselves."""


_DECODING = (1, 2, 4, 8)
"""What is packed pays for one of these numbers of tokens at least."""


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """A site with the rule and the sizes that were decided for it.

    Attributes:
      packs: whether the site's weights are packed: a rule asks for it, and it pays for some small
        number of tokens. (Whether it is rewritten in a given call depends on that call's.)
      state: the name under which they are packed: the first site's with the same weights, so
        that a weight that is used several times is packed once.
      budget: groups that are fetched for all tokens together, at most; None for no limit.
      asked: whether mode "exact" gives it its top-k on raw weights: a rule of the user's asks for
        it, whether that pays or not, or it is packed.
      undecided: whether its `k="auto"` has not been calibrated; the spec has all groups then.
    """

    found: Found
    site: Site
    spec: FFNSpec | HeadSpec | None
    packs: bool
    state: str
    budget: int | None = None
    asked: bool = False
    undecided: bool = False

    @property
    def rewritten(self) -> bool:
        return self.site.status == "rewritten"


def min_width(rules: Sequence[Rule]) -> int:
    """The least width at which a linear layer may be a vocabulary for one of the rules."""
    return min((rule.min_width for rule in rules if isinstance(rule, Head)), default=Head.min_width)


def decide(
    detection: Detection,
    rules: Sequence[Rule],
    learned: Mapping[str, Learned],
    machine: Machine | None = None,
) -> tuple[Plan, tuple[Decision, ...]]:
    """The plan of a function.

    Args:
      rules: the user's, in order; none stands for `DEFAULT_RULES`.
      learned: what calibration told about sites, by name.
      machine: where sites have to pay; None for `machine.current()`.

    Raises:
      HireRewriteError: a rule asks for more rows than a site has.
    """
    default = not rules
    machine = machines.current() if machine is None else machine
    rules = rules or DEFAULT_RULES
    decisions = []
    used: set[int] = set()
    for found in detection.found:
        number = next((i for i, r in enumerate(rules) if _fits(r, found, default)), None)
        if number is None:
            decisions.append(_without_rule(found))
            continue
        used.add(number)
        known = learned.get(found.name)
        decisions.append(_with_rule(found, rules[number], default, known, machine))
    unused = () if default else tuple(r for i, r in enumerate(rules) if i not in used)
    decisions = _sharing(decisions)
    plan = Plan(
        tuple(decision.site for decision in decisions),
        detection.rejected,
        detection.opaque,
        unused,
        kernels.cpu.status(),
        machine.name,
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
    pieces = 1 if found.shards is None else found.shards.pieces
    return isinstance(rule, Head) and match.width * pieces >= rule.min_width


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


def _with_rule(
    found: Found, rule: Rule, default: bool, learned: Learned | None, machine: Machine
) -> Decision:
    if found.obstacle is not None:
        site = _site(found, rule, "dense", found.obstacle)
        return Decision(found, site, None, False, found.name)
    undecided = isinstance(rule, FFN) and rule.k == "auto" and not (learned and learned.k)
    wanted = dataclasses.replace(rule, k=1.0, candidates=None) if undecided else rule
    try:
        found, spec = _fitting(found, wanted, default, learned)
    except Unfit as unfit:
        return Decision(found, _site(found, rule, "dense", str(unfit)), None, False, found.name)
    if undecided:
        reason = 'k="auto" is found by calibration: pack(..., calibration=batches)'
        site = _site(found, rule, "dense", reason)
        return Decision(found, site, spec, False, found.name, undecided=True)
    rule.predictor.check(scored_rows(spec), found.match.linears[0].in_dim, site=found.name)
    budget = budget_of(found, spec, rule)
    now = estimate(found, spec, rule.predictor, found.tokens, learned, budget, machine)
    packs = rule.force or any(
        estimate(found, spec, rule.predictor, tokens, learned, budget, machine).pays
        for tokens in _DECODING
        if rule.max_tokens is None or tokens <= rule.max_tokens
    )
    if rule.max_tokens is not None and found.tokens > rule.max_tokens:
        status = "dense"
        reason = f"{found.tokens} tokens are more than max_tokens={rule.max_tokens}"
    elif not rule.force and not (packs and now.pays):
        status = "dense"
        reason = (
            f"expected {now.ratio:.2f} times as fast as dense (would read {now.after / 1e6:.1f} MB "
            f"instead of {now.before / 1e6:.1f}), and has to be {now.margin:.1f}: ask for fewer "
            "candidates or a smaller predictor, or give force=True"
        )
    else:
        status, reason = "rewritten", _describe(spec, rule, found)
    if status == "dense" and packs:
        reason += "; the same top-k in dense arithmetic"
    elif status == "dense" and isinstance(spec, FFNSpec):
        reason += "; without a top-k, which mode exact has on raw weights all the same"
    if status == "rewritten" and learned is not None:
        reason += _until(found, spec, rule, learned, budget, machine)
    after = now.after if status == "rewritten" else None
    site = _site(found, rule, status, reason, after, now.ratio)
    return Decision(found, site, spec, packs, found.name, budget, asked=packs or not default)


def _fitting(
    found: Found, rule: Rule, default: bool, learned: Learned | None
) -> tuple[Found, FFNSpec | HeadSpec]:
    """The sizes at a site; one that cannot be spread, and need not be, is not.

    Raises:
      Unfit: the rule cannot be applied to this site.
    """
    try:
        return found, spec_of(found, rule, default, learned)
    except Unfit:
        if found.spread is None or found.spreads_itself:
            raise
    found = dataclasses.replace(found, spread=None)
    return found, spec_of(found, rule, default, learned)


def _until(
    found: Found,
    spec: FFNSpec | HeadSpec,
    rule: Rule,
    learned: Learned,
    budget: int | None,
    machine: Machine,
) -> str:
    """From how many tokens on a calibrated block is as slow as dense."""
    if not isinstance(spec, FFNSpec) or not learned.union:
        return ""
    sizes = [2**i for i in range(len(learned.union))]
    estimates = {
        n: estimate(found, spec, rule.predictor, n, learned, budget, machine) for n in sizes
    }
    first = next((n for n in sizes if n >= found.tokens and not estimates[n].pays), None)
    if first is None:
        return f"; for up to {sizes[-1]} tokens it is faster than dense"
    return f"; from {first} tokens on it is no faster than dense"


def _describe(spec: FFNSpec | HeadSpec, rule: Rule, found: Found) -> str:
    if isinstance(spec, FFNSpec):
        k, candidates = spec.k_groups * spec.group, spec.candidate_groups * spec.group
        what = f"top {k} of {candidates} candidates of {spec.width}, in groups of {spec.group}"
    else:
        what = f"top {spec.k} of {spec.candidates} candidates of {spec.width}"
        what += f", {spec.certify} proved" if spec.certify else ""
    hint = " (calibrate it in pack)" if rule.predictor.wants_calibration else ""
    return f"{what}, guessed by {rule.predictor}{hint}{_described_spread(spec, found)}"


def _described_spread(spec: FFNSpec | HeadSpec, found: Found) -> str:
    """Over which devices a site is spread, and what they send each other."""
    spread = found.spread
    if found.shards is not None:
        return f", for each device of {found.shards} by itself" if found.shards.axes else ""
    if spread is None:
        return ""
    if isinstance(spec, FFNSpec):
        return f", spread over {spread}"
    sizes, each = [spread.mesh.shape[axis] for axis in spread.axes], spec.candidates // spec.parts
    if spec.tail == "-inf":
        return f", spread over {spread}"
    rows = found.tokens // spread.groups(found.tokens)
    merge = cheapest(spread.axes, sizes, min(spec.k, each), spec.k, rows=rows)
    return f", spread over {spread}, compared by {described(merge, rows)}"


def _site(
    found: Found,
    rule: Rule | None,
    status: str,
    reason: str,
    after: int | None = None,
    expected: float | None = None,
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
        expected=expected,
        source=source_of(match.linears[-1].node),
    )
