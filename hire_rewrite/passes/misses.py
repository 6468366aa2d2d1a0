"""What a call leaves as it is though somebody asked for more, and what to change."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import jax.numpy as jnp

from hire_rewrite.graph.nodes import Value
from hire_rewrite.graph.provenance import Provenance
from hire_rewrite.graph.trace import Argument, Trace
from hire_rewrite.names import first_names
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.diff.value import megabytes
from hire_rewrite.patterns.linear import as_linear
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from hire_rewrite.plan import Plan
from hire_rewrite.rules import Rule
from hire_rewrite.sites import site_kinds


def unused_rules(plan: Plan, decisions: Sequence[Decision]) -> list[tuple[Hashable, str]]:
    """A message for each rule that fits no site, with what it is told apart by."""
    return [
        (("unused", rule), f"no site fits {rule}: {_there(rule, plan, decisions)}")
        for rule in plan.unused_rules
    ]


def _there(rule: Rule, plan: Plan, decisions: Sequence[Decision]) -> str:
    """What a function has of the kind that a rule asks for."""
    kind = next(kind.name for kind in site_kinds() if isinstance(rule, kind.rule))
    names = [d.name for d in decisions if d.site.kind.name == kind]
    if names:
        some = first_names(names)
        return f"sites of its kind are {some}: change its path or sizes, and see .plan(...)"
    near = (r for r in plan.rejected if r.near and r.refusal is not Refusal.UNSUPPORTED)
    layer = next(near, None)
    text = f"there is no {kind} site"
    if layer is not None and not plan.hints:
        text += f" (the closest, {layer.name}, is none: {layer.reason}, at {layer.source})"
    return f"{text}: see .plan(...)"


def idle_rules(
    plan: Plan, decisions: Sequence[Decision], rules: Sequence[Rule], *, exact: bool
) -> list[tuple[Hashable, str]]:
    """A message for each rule whose sites all stay dense; without rules, one if nothing is
    rewritten.

    Args:
      rules: the user's.
      exact: whether it is enough that a rule asks for a site (mode "exact" on raw weights).
    """
    messages: list[tuple[Hashable, str]] = []
    for rule in rules:
        own = [d for d in decisions if d.row.rule is rule]
        if own and not any(map(_may_run, own)) and not (exact and any(d.asked for d in own)):
            largest = max(own, key=lambda d: d.row.bytes_before)
            more = f" (and {len(own) - 1} more like it)" if len(own) > 1 else ""
            text = f"{rule} rewrites nothing: {largest.name}{more}: {largest.row.reason}"
            messages.append((("idle", rule), text))
    if rules or exact or any(map(_may_run, decisions)):
        return messages
    if plan.sites:
        site = max(plan.sites, key=lambda site: site.bytes_before)
        text = f"nothing is rewritten: {site.name}: {site.reason}"
        return [("idle", f"{text}; see .plan(...)")]
    if plan.rejected:
        layer = plan.rejected[0]
        return [("idle", f"nothing is rewritten: {layer.name}: {layer.reason} ({layer.source})")]
    return []


def absent_sites(decisions: Sequence[Decision]) -> list[tuple[Hashable, str]]:
    """A message for each rule that asks for sites which a `Packed` does not hold."""
    absent: dict[Rule | None, list[str]] = {}
    for decision in decisions:
        if decision.absent:
            absent.setdefault(decision.row.rule, []).append(decision.name)
    return [
        (
            ("absent", rule),
            f"the Packed does not hold {first_names(names)}, which {rule} asks for: pack with this "
            "function, or give transform the rules that it was packed with (Packed.rules)",
        )
        for rule, names in absent.items()
    ]


def _may_run(decision: Decision) -> bool:
    """Whether a site is packed, or may be when packing has looked at it."""
    operation = decision.operation
    unknown = operation is not None and (operation.undecided or operation.unexamined)
    return decision.packs or bool(unknown)


def unlisted_weights(trace: Trace, weights: Sequence[int]) -> str | None:
    """What an argument holds that is multiplied as weights are and is not among them.

    Args:
      weights: the positions of the arguments that hold weights.

    Returns:
      A sentence for a user, or None: no other argument has more than those that are listed.
    """
    inputs: dict[Argument, list[int]] = {}
    for i, argument in enumerate(trace.arguments):
        inputs.setdefault(argument, []).append(i)
    known = sum(_size(trace.scope.inputs[i]) for i in trace.weights)
    most, holder, products = known, None, 0
    for argument, numbers in inputs.items():
        if argument.position in weights:
            continue
        values = [trace.scope.inputs[i] for i in numbers]
        size = sum(map(_size, values))
        if size > most and (count := _products(trace, numbers)):
            most, holder, products = size, argument, count
    if holder is None:
        return None
    listed = f"weights={weights[0] if len(weights) == 1 else tuple(weights)}"
    what = f"{products} product(s) read {megabytes(most)} of arrays in"
    if holder.position is None:
        return (
            f"{what} the keyword argument `{holder.name}`, which weights= "
            "cannot list: give it by position, in a function of your own around this one if its "
            "signature does not allow that"
        )
    return (
        f"{what} argument {holder.position} `{holder.name}`, which is not "
        f"among {listed}: if it holds weights, give transform(..., weights={holder.position})"
    )


_MUCH = 10
"""How many times as many bytes must be closed over as the weights argument holds."""


def closed_over(trace: Trace, weights: Sequence[int]) -> str | None:
    """What is closed over where an argument that is listed among weights holds none.

    Args:
      weights: the positions of the arguments that hold weights.

    Returns:
      A sentence for a user, or None.
    """
    inputs = [trace.scope.inputs[i] for i in trace.weights]
    if not weights or any(map(_size, inputs)):
        return None
    constants = {id(v.const): v for v in trace.scope.operands() if v.const is not None}.values()
    size = sum(map(_size, constants))
    held = sum(math.prod(value.shape) * value.dtype.itemsize for value in inputs)
    if size <= _MUCH * held or not _products(trace, ()):
        return None
    names = dict.fromkeys(trace.arguments[i] for i in trace.weights)
    listed = ", ".join(f"{argument.position} `{argument.name}`" for argument in names)
    types = ", ".join(value.aval.str_short() for value in inputs[:3]) + (
        ", ..." * (len(inputs) > 3)
    )
    return (
        f"argument {listed or weights[0]} holds no matrix of weights ({types or 'no array'}), and "
        f"{megabytes(size)} of arrays are closed over: if those are the weights, give "
        "transform(..., weights=()), or a Packed keeps the values of that argument for ever"
    )


def _products(trace: Trace, numbers: Sequence[int]) -> int:
    """How many products there would be with them if these inputs, or what is closed over where
    there are none, were the weights."""
    provenance = Provenance(trace.scope, numbers)
    inputs = {trace.scope.inputs[i] for i in numbers}
    count = 0
    for scope in trace.scope.walk():
        for node in scope.nodes:
            try:
                linear = as_linear(node, provenance)
            except NoMatch:
                continue
            # Products with axes that both have are attention's, with what a cache holds.
            if linear is not None and not linear.batch:
                roots = provenance.roots(linear.weight)
                count += any(root in inputs if inputs else root.const is not None for root in roots)
    return count


def _size(value: Value) -> int:
    """Bytes of a matrix, or of a stack of them."""
    if len(value.shape) < 2 or not jnp.issubdtype(value.dtype, jnp.inexact):
        return 0
    return math.prod(value.shape) * int(value.dtype.itemsize)
