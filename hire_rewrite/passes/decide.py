"""Match rules with sites: what is rewritten, with which sizes, and why the rest is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite import _compat
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.estimate import Estimate, dense_bytes, estimate
from hire_rewrite.cost.machine import Machine
from hire_rewrite.graph.nodes import source_of
from hire_rewrite.ops import kernels
from hire_rewrite.packed_info import PackedInfo, PackedSite
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.detect import Detection
from hire_rewrite.passes.flow import layers_of
from hire_rewrite.passes.listing import counted_once, sharing, shown_of
from hire_rewrite.plan import Plan, Site
from hire_rewrite.rules import Rule
from hire_rewrite.sharding.rows import UNSHARDED
from hire_rewrite.sites import MatchedSite, Operation, Unfit
from hire_rewrite.sites.kind import Functions, StaysDense

_ABSENT = "the Packed does not hold it: pack with this function to rewrite it"
_DECODING = (1, 2, 4, 8)
"""What is packed pays for one of these numbers of tokens at least."""


class OtherLayout(Exception):  # noqa: N818 (a finding: of a Packed that nobody gave, no error)
    """What a site was packed to, and what a rule asks for instead."""


def decide(
    detection: Detection,
    rules: Sequence[Rule],
    statistics: Mapping[str, Any],
    packed: PackedInfo | None = None,
    machine: Machine | None = None,
) -> tuple[Plan, tuple[Decision, ...]]:
    """The plan of a function.

    Args:
      rules: the user's, in order; none stands for the default rule of each site.
      statistics: what calibration, or a look at their numbers, told about sites, by label.
      packed: what the weights were packed to; then what is packed was decided there.
      machine: where sites have to pay; None for `machine.current()`.

    Raises:
      HireRewriteError: a rule asks for more rows than a site has.
      OtherLayout: a rule asks for another layout than a site was packed to.
    """
    decider = _Decider(rules, statistics, packed, machine or machines.current())
    decisions = [decider.decide(site) for site in detection.sites]
    packing = [decision for decision in decisions if decision.packs]
    taken = frozenset(node for decision in packing for node in decision.nodes)
    names = [decision.name for decision in packing]
    leftovers, refused = detection.leftovers(lambda node: node not in taken, names, taken)
    left = [*map(decider.decide, leftovers)]
    if not rules:
        inner, _ = detection.leftovers(lambda node: node in taken)
        within = [*map(decider.decide, inner)]
        decisions, left = _without_loss(decisions, within, left)
    decisions = sharing([*decisions, *left])
    near = frozenset(node for node, rejection in detection.rejected.items() if rejection.near)
    shown = counted_once(shown_of(decisions, near, rules=bool(rules)))
    nodes = {node for decision in shown for node in decision.nodes}
    reasons = {node: decision.row.reason for decision in left for node in decision.products}
    told = detection.rejections(refused, reasons)
    rejected = [(node, rejection) for node, rejection in told if node not in nodes]
    plan = Plan(
        tuple(decision.row for decision in shown),
        tuple(r for _, r in rejected),
        detection.opaque,
        tuple(rule for rule in rules if id(rule) not in decider.used),
        kernels.cpu.status(),
        decider.machine.name,
        layers=layers_of(detection, shown, rejected),
    )
    if plan.rewritten and decider.machine.name.startswith("cpu"):
        kernels.cpu.announce()
    return plan, tuple(decisions)


@dataclasses.dataclass
class _Decider:
    rules: Sequence[Rule]
    statistics: Mapping[str, Any]
    packed: PackedInfo | None
    machine: Machine
    used: set[int] = dataclasses.field(default_factory=set)
    functions: Functions = dataclasses.field(default_factory=dict)

    def decide(self, site: MatchedSite) -> Decision:
        rule = self._rule_of(site)
        if rule is None:
            return Decision(site, _row(site, None, site.kind.unasked(site.match)))
        if site.unsupported is not None:
            return Decision(site, _row(site, rule, site.unsupported))
        try:
            operation, packed, known = self._resolved(site, rule)
        except Unfit as unfit:
            return Decision(site, _row(site, rule, str(unfit)))
        site = operation.site
        if isinstance(known, StaysDense) and operation.examines:
            return Decision(site, _row(site, rule, known.reason))
        unknown = operation.undecided or operation.unexamined
        if unknown is not None:
            return Decision(site, _row(site, rule, unknown), operation)
        operation.check()
        now = estimate(operation, site.tokens, self.machine)
        packs = self._packs(operation, packed)
        absent = self.packed is not None and not packs and self._would_pack(operation)
        reason, rewritten = (_ABSENT, False) if absent else self._reason(operation, packs, now)
        row = _row(site, rule, reason, now, rewritten=rewritten)
        name = site.name if packed is None else packed.name
        asked = packs or bool(self.rules)
        missing = absent and bool(self.rules)
        return Decision(site, row, operation, packs, name, asked, now, missing)

    def _rule_of(self, site: MatchedSite) -> Rule | None:
        kind = site.kind
        if not self.rules:
            return kind.default_rule(site.match)
        for rule in self.rules:
            if isinstance(rule, kind.rule) and rule.names(site.name) and kind.asks(rule, site):
                self.used.add(id(rule))
                return rule
        return None

    def _resolved(
        self, site: MatchedSite, rule: Rule
    ) -> tuple[Operation, PackedSite | None, Hashable]:
        """The operation at a site, what the site is packed to (of several the one that the rule
        asks for, if it is there), and what was told about it.

        Raises:
          Unfit: the rule cannot be applied to this site.
        """
        if self.packed is None:
            known = self.statistics.get(site.label)
            return self._resolve(site, rule, known), None, known
        which = site.kind.name, site.key
        sites = self.packed.sites_of(*which)
        for packed in sites if len(sites) > 1 else ():
            operation = self._resolve(site, rule, packed.statistics)
            unknown = operation.undecided or operation.unexamined
            if unknown is None and repr(operation.layout) == packed.layout:
                return operation, packed, packed.statistics
        if sites:
            told = sites[0].statistics
            return self._resolve(site, rule, told), sites[0], told
        examined = self.packed.examined_site(*which)
        told = examined and examined.statistics
        return self._resolve(site, rule, told), None, told

    def _resolve(self, site: MatchedSite, rule: Rule, known: Any) -> Operation:
        """The operation at a site; one that cannot be sharded, and need not be, is not.

        Raises:
          Unfit: the rule cannot be applied to this site.
        """
        known = None if isinstance(known, StaysDense) else known
        try:
            return site.kind.resolve(site, rule, known, self.functions)
        except Unfit:
            if not site.optional_sharding:
                raise
        site = dataclasses.replace(site, sharding=UNSHARDED)
        return site.kind.resolve(site, rule, known, self.functions)

    def _packs(self, operation: Operation, packed: PackedSite | None) -> bool:
        if self.packed is None:
            return self._would_pack(operation)
        if packed is None:
            return False
        if packed.layout != repr(operation.layout):
            rules = (r for r in self.packed.rules if isinstance(r, type(operation.rule)))
            before = next((rule for rule in rules if rule.names(packed.name)), None)
            mine, asked = _differences(before, operation.tuned_rule())
            raise OtherLayout(
                f"{operation.site.name}: the Packed has it with {mine}, but this function's rules "
                f"ask for {asked}: pack again with this function, or give transform the rules that "
                "it was packed with (Packed.rules)"
            )
        return True

    def _would_pack(self, operation: Operation) -> bool:
        """Whether packing with these rules packs it: it pays for some small number of tokens."""
        counts = filter(operation.rule.takes, _DECODING)
        pay = (estimate(operation, tokens, self.machine).pays for tokens in counts)
        return operation.rule.force or any(pay)

    def _reason(self, operation: Operation, packs: bool, now: Estimate) -> tuple[str, bool]:
        """Why a site is what it is, and whether it is rewritten."""
        rule, tokens = operation.rule, operation.site.tokens
        if rule.takes(tokens) and (rule.force or (packs and now.pays)):
            return operation.describe() + self._limit(operation), True
        if not rule.takes(tokens):
            reason = _too_many(tokens, rule.max_tokens)
        else:
            advice = "ask for fewer candidates or a smaller predictor, or give "
            reason = (
                f"expected {now.ratio:.2f} times as fast as dense (would read "
                f"{now.after / 1e6:.1f} MB instead of {now.before / 1e6:.1f}), and has to be "
                f"{now.margin:.1f}: {advice if operation.candidates else 'give '}force=True"
            )
        if packs:
            return f"{reason}; the same meaning in dense arithmetic", False
        if not operation.exact_is_dense:
            reason += "; without a top-k, which mode exact has on raw weights all the same"
        return reason, False

    def _limit(self, operation: Operation) -> str:
        """From how many tokens on a calibrated site is as slow as dense."""
        sizes = operation.calibrated_tokens
        if not sizes:
            return ""
        for tokens in sizes:
            pays = estimate(operation, tokens, self.machine).pays
            if _compat.at_most(operation.site.tokens, tokens) and not pays:
                return f"; from {tokens} tokens on it is no faster than dense"
        return f"; for up to {sizes[-1]} tokens it is faster than dense"


def _too_many(tokens: Any, most: int | None) -> str:
    if not jax.export.is_symbolic_dim(tokens):
        return f"{tokens} tokens are more than max_tokens={most}"
    return (
        f"{tokens} tokens may be more than max_tokens={most}: give max_tokens=None, or "
        f"jax.export.symbolic_shape(..., constraints=['{tokens} <= {most}'])"
    )


def _differences(before: Rule | None, now: Rule) -> tuple[str, str]:
    """The settings of a rule that differ from those of the one before, of both."""
    fields = [field.name for field in dataclasses.fields(now)]  # type: ignore[arg-type]
    fields = [name for name in fields if name not in ("path", "force", "max_tokens")]
    if before is not None and type(before) is type(now):
        fields = [name for name in fields if getattr(before, name) != getattr(now, name)] or fields
    texts = [
        ", ".join(f"{name}={getattr(rule, name, None)!r}" for name in fields)
        for rule in (before, now)
    ]
    return texts[0], texts[1]


def _without_loss(
    decisions: Sequence[Decision], within: Sequence[Decision], left: Sequence[Decision]
) -> tuple[list[Decision], list[Decision]]:
    """Sites that may lose something, or products read without loss where that takes no longer.

    Args:
      within: the products of the packed ones as sites of their own.
      left: all others.

    Returns:
      The sites, and their products and the others as far as they are packed or to be examined.
    """
    names = {decision.name for decision in left}
    settled, taking = [], [*left, *(d for d in within if not d.packs)]
    for decision in decisions:
        own = [d for d in (*within, *left) if d.packs and d.products <= decision.products]
        covered = decision.products <= {node for d in own for node in d.products}
        if decision.operation is not None and covered:
            inside = [d for d in own if d not in left]
            time = sum(d.estimated.rewritten for d in own)
            shorter = not decision.packs or time <= decision.estimated.rewritten
            if shorter and not names & {d.name for d in inside}:
                reason = f"read without loss ({own[0].op.describe()}), which takes no longer"
                decision = Decision(decision.site, _row(decision.site, decision.row.rule, reason))
                taking += inside
        settled.append(decision)
    return settled, taking


def _row(
    site: MatchedSite,
    rule: Rule | None,
    reason: str,
    now: Estimate | None = None,
    *,
    rewritten: bool = False,
) -> Site:
    """A site as the plan has it."""
    before = dense_bytes(site)
    summary: dict[str, Any] = {"gated": False, "activation": "", "experts": 1} | dict(
        site.kind.summary(site.match)
    )
    return Site(
        name=site.name,
        kind=site.kind.name,
        d_model=site.d_model,
        repeats=site.repeats,
        tokens=site.tokens,
        rule=rule,
        status="rewritten" if rewritten else "dense",
        reason=reason,
        bytes_before=before,
        bytes_after=now.after if now is not None and rewritten else before,
        expected=None if now is None else now.ratio,
        source=source_of(site.linears[-1].node),
        **summary,
    )
