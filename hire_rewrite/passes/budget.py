"""Choose what sites become, so that a step is fastest within a budget of divergence.

Each site has rules that are worth a trial (`SiteKind.trials`). Each is measured alone: how far the
model with nothing else rewritten diverges from the dense one on held-out batches, each token as if
it were decoded alone (with many tokens in a call a site may lose less, or be dense). Divergences
are small and about add up, so a choice is made by time gained for divergence spent, and then
measured as a whole, on the batches that no choice was made by. Layers that differ in numbers of
their names alone are tried together, as those of a `scan` are, which are one site. Where time is
short, each such group has a trial before any has a second one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hire_rewrite.analyses import Analyses
from hire_rewrite.analysis import Analysis
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.estimate import dense_bytes, estimate
from hire_rewrite.errors import HireRewriteError, warn
from hire_rewrite.graph.nodes import Node
from hire_rewrite.names import grouped
from hire_rewrite.packed import Packed
from hire_rewrite.passes.accumulate import accumulate, numbers_of
from hire_rewrite.passes.logits import (
    check_defined,
    divergence,
    last_logits,
    undefined,
    with_logits,
)
from hire_rewrite.passes.modes import decoded
from hire_rewrite.passes.progress import progress
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.passes.tune import held_out
from hire_rewrite.rules import Rule
from hire_rewrite.sites import MatchedSite
from hire_rewrite.tuned import Trial, Tuned

_ATTEMPTS = 5
"""How often the budget is made smaller, where divergences together are more than their sum."""

_NOTHING = 1e-9
"""Divergences below this many nats are rounding."""


_NOWHERE = "(?!)"
"""A path that no site has."""


Group = tuple[MatchedSite, ...]
"""Sites that are tried together."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A rule at some products, with what it gains and costs."""

    nodes: frozenset[Node]
    trial: Trial

    @property
    def kl(self) -> float:
        assert self.trial.kl is not None
        return max(self.trial.kl, _NOTHING)


def choose(options: Sequence[Option], budget: float) -> list[Option]:
    """Options of the greatest gain for their divergences, whose sum is at most `budget`.

    Greedy: at each step the option is taken that gains most time for each nat, beside what is taken
    already or in place of options that have a product in common with it.
    """
    chosen: list[Option] = []
    while True:
        steps = []
        for option in options:
            given_up = [other for other in chosen if other.nodes & option.nodes]
            gain = option.trial.gain - sum(other.trial.gain for other in given_up)
            cost = option.kl - sum(other.kl for other in given_up)
            total = cost + sum(other.kl for other in chosen)
            if gain > 0 and total <= budget:
                steps.append((gain / max(cost, _NOTHING), gain, option, given_up))
        if not steps:
            return chosen
        *_, option, given_up = max(steps, key=lambda step: step[:2])
        chosen = [*(other for other in chosen if other not in given_up), option]


def tune_within(
    analyses: Analyses,
    weights: Any,
    batches: Iterable[tuple[Any, ...]],
    kl: float,
    seconds: float | None,
    kwargs: Mapping[str, Any],
) -> Tuned:
    """The rules that `Transformed.tune` returns for a budget `kl`, in nats a token."""
    clock = _Clock(seconds)
    if not isinstance(kl, int | float) or not kl > 0.0:
        raise HireRewriteError(f"tune: kl={kl!r} must be a positive number of nats a token")
    if seconds is not None and (not isinstance(seconds, int | float) or not seconds > 0.0):
        raise HireRewriteError(f"tune: seconds={seconds!r} must be a positive number, or None")
    checking, trying = held_out(batches)
    given = dict(zip(analyses.weights, analyses.weight_arguments(weights), strict=True))
    step = _Step(analyses, given, kwargs, analyses.joined(given, trying[0]))
    offers = [
        [(group, rule) for rule in group[0].kind.trials(group[0], own)]
        for group, own in step.groups()
    ]
    if not any(offers):
        raise HireRewriteError(
            f"tune: no site of {analyses.name} has anything to choose: look at .plan(...)"
        )
    dense, budget = step.dense_logits(checking), kl  # first: batches are refused before any trial
    options, untried = _options(step, offers, trying, clock, len(checking) / len(trying))
    for _ in range(_ATTEMPTS):
        chosen = choose(options, budget)
        rules = [option.trial.rule for option in chosen]
        total = step.divergence(rules, checking, dense) if rules else 0.0
        if rules and total <= kl:
            if untried:
                warn(
                    f"{analyses.name}: tune: seconds={seconds} were up when {untried} trial(s) "
                    "were to come: these are the best rules of those that were tried"
                )
            trials = [option.trial for option in options]
            return Tuned(rules, [option.trial for option in chosen], trials, total, untried)
        budget *= 0.9 * kl / max(total, kl)
    least = min((option.kl for option in options), default=float("inf"))
    late = f", or more than seconds={seconds}, which were up when {untried} trials were to come"
    raise HireRewriteError(
        f"tune: nothing that was tried gains time within kl={kl}: the least divergence of a site "
        f"alone was {least:.1e} nats a token; give a larger budget{late if untried else ''}"
    )


class _Clock:
    """How long tuning takes, and may take."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._start = seconds, time.monotonic()

    def spent(self) -> float:
        return time.monotonic() - self._start

    def left(self, reserved: float) -> float:
        """Seconds that are left beside those that are reserved."""
        return float("inf") if self._seconds is None else self._seconds - self.spent() - reserved


def _options(
    step: _Step,
    offers: Sequence[Sequence[tuple[Group, Rule]]],
    batches: Sequence[Any],
    clock: _Clock,
    more: float,
) -> tuple[list[Option], int]:
    """What was tried and gains time, in the order of the offers, and how many were not tried.

    Args:
      offers: of each group of sites.
      more: how many times as many batches the whole is measured on in the end, for which some of
        the time is kept.
    """
    dense = step.dense_logits(batches)
    large_first = sorted(offers, key=lambda own: -sum(map(dense_bytes, own[0][0])) if own else 0)
    order = [offer for turn in itertools.zip_longest(*large_first) for offer in turn if offer]
    found: dict[tuple[Group, Rule], Option] = {}
    tried, took = 0, []
    with progress("tuning", "trial", len(order)) as advance:
        for group, rule in order:
            start = clock.spent()
            trial = step.trial(group, rule, batches, dense)
            if trial is not None:
                nodes = (site.match.nodes | site.match.shared for site in group)
                found[group, rule] = Option(frozenset().union(*nodes), trial)
                took.append(clock.spent() - start)
            tried += 1
            # The first one compiles what the others find compiled, and says nothing of them; the
            # last one, of the whole, has more to pack and more batches.
            usual = statistics.median(took[1:] or [0.0])
            left = clock.left(max(took, default=0.0) + more * usual)
            advance("" if left == float("inf") else f"{max(left, 0.0):.0f} s left for trials")
            if left <= 0.0 or left < usual:
                break
    ordered = (offer for own in offers for offer in own)
    return [found[offer] for offer in ordered if offer in found], len(order) - tried


class _Step:
    """A step whose weights are known, rewritten by some rules or others."""

    def __init__(
        self,
        analyses: Analyses,
        given: Mapping[int, Any],
        kwargs: Mapping[str, Any],
        args: Sequence[Any],
    ) -> None:
        self.analyses, self.given, self.kwargs, self.args = analyses, given, kwargs, args
        self.leaves = jax.tree.leaves([args[i] for i in analyses.weights])

    @functools.cached_property
    def _all_sites(self) -> list[MatchedSite]:
        detection = self.analyses.of(None, self.args, self.kwargs).detection
        return [*detection.sites, *detection.leftovers(lambda _: True)[0]]

    @property
    def names(self) -> list[str]:
        """Those of all sites."""
        return [site.name for site in self._all_sites]

    def groups(self) -> list[tuple[Group, Rule | None]]:
        """Sites that the function's rules ask for, with these; all if it has none. Those that are
        alike but for numbers in their names are one group."""
        rules, alike = self.analyses.rules, dict[Hashable, tuple[list[MatchedSite], Rule | None]]()
        for site in self._all_sites:
            asking = (r for r in rules if isinstance(r, site.kind.rule) and r.names(site.name))
            rule = next(asking, None)
            if rule is not None or not rules:
                alike.setdefault((rule, *_likeness(site)), ([], rule))[0].append(site)
        return [(tuple(sites), rule) for sites, rule in alike.values()]

    def _packed(self, rules: Sequence[Rule]) -> tuple[Analyses, Analysis, Packed]:
        # The user's rules say what is a vocabulary, whether they ask for one or not.
        silent = (rule.replace(path=_NOWHERE) for rule in self.analyses.rules)
        again = self.analyses.again((*rules, *silent))
        analysis = again.of(None, self.args, self.kwargs)
        analysis = again.examined(analysis, self.args, self.kwargs, self.leaves)
        return again, analysis, analysis.pack(self.leaves)

    def trial(
        self, group: Group, rule: Rule, batches: Sequence[Any], dense: Sequence[Array]
    ) -> Trial | None:
        """A rule at some sites alone; None if one cannot have it, or they gain nothing by it."""
        forced = [rule.for_site(site.name, force=True) for site in group]
        again, analysis, packed = self._packed(forced)
        labels = {site.label for site in group}
        decisions = [d for d in analysis.packing if d.site.label in labels]
        if len(decisions) < len(group):
            return None
        costs = [estimate(d.op, 1, machines.current()) for d in decisions]
        gain = sum(cost.dense - cost.rewritten for cost in costs)
        if gain <= 0.0:
            return None
        sites = [site.name for site in group]
        written = {d.op.tuned_rule().for_site(group[0].name, force=True) for d in decisions}
        # Layers may each have a grid of their own, which the rule finds again.
        own = written.pop() if len(written) == 1 else forced[0]
        own = own.for_layers(sites, self.names)
        kl = self._divergence(again, packed, batches, dense)
        return Trial(", ".join(grouped(sites)), own, sum(c.after for c in costs), kl=kl, gain=gain)

    def divergence(
        self, rules: Sequence[Rule], batches: Sequence[Any], dense: Sequence[Array]
    ) -> float:
        """Mean KL divergence of the rewritten step from the dense one, in nats a token.

        Each token as if it were decoded alone, as `evaluate` has it.
        """
        again, _, packed = self._packed(rules)
        return self._divergence(again, packed, batches, dense)

    def _divergence(
        self, again: Analyses, packed: Packed, batches: Sequence[Any], dense: Sequence[Array]
    ) -> float:
        given = dict.fromkeys(self.given) | dict.fromkeys(again.weights[:1], packed)
        known = iter(dense)

        def prepare(batch: tuple[Any, ...]) -> tuple[Analysis, Any]:
            args = again.joined(given, batch)
            analysis = again.of(packed, args, self.kwargs)
            rest = again.without_weights(tuple(args), packed)
            return analysis, (packed, analysis.inputs(packed, rest, self.kwargs), next(known))

        def build(analysis: Analysis) -> Callable[[Any], Any]:
            def run(operands: Any) -> dict[str, Any]:
                packed, inputs, dense = operands
                swaps = analysis.replacements(packed, decoded)
                got = jax.nn.log_softmax(_logits(analysis, swaps, inputs), axis=-1)
                return {"kl": divergence(dense, got), "tokens": jnp.float32(dense.shape[0])}

            return run

        total = accumulate("tuning batch", batches, None, prepare, build)
        kl = float(total["kl"] / total["tokens"])
        return math.inf if math.isnan(kl) else kl  # what is not a number is no closer

    def dense_logits(self, batches: Sequence[tuple[Any, ...]]) -> list[Array]:
        """Log probabilities of the dense model, f32[tokens, V] for each batch.

        Raises:
          HireRewriteError: those of a token are not numbers.
        """
        results = []
        for number, batch in zip(numbers_of(batches), batches, strict=False):
            args = self.analyses.joined(self.given, batch)
            analysis = self.analyses.of(None, args, self.kwargs)
            inputs = analysis.inputs(None, args, self.kwargs)
            logits, bad = self._dense(analysis)(inputs)
            check_defined(f"tune: batch {number}", int(bad), logits.shape[0])
            results.append(logits)
        return results

    @functools.cache  # noqa: B019 (lives as long as one call of tune)
    def _dense(self, analysis: Analysis) -> Callable[[Any], tuple[Array, Array]]:
        def run(inputs: Any) -> tuple[Array, Array]:
            known = jax.nn.log_softmax(_logits(analysis, (), inputs), axis=-1)
            return known, undefined(known).sum()

        return jax.jit(run)


def _likeness(site: MatchedSite) -> tuple[Hashable, ...]:
    """Equal for sites that differ in numbers of their names alone."""
    return (
        site.kind.name,
        re.sub(r"\d+", "0", site.name),
        tuple((weight.shape, str(weight.dtype)) for weight in site.match.weights),
        site.layers,
        site.tokens,
    )


def _logits(analysis: Analysis, swaps: Sequence[Any], inputs: Any) -> Array:
    """f32[tokens, V], the last logits of a step with replacements."""
    place = last_logits(analysis.decisions)
    if place is None:
        raise HireRewriteError(
            "tune: there is no vocabulary head outside of loops and shard_maps whose logits could "
            "be compared with the dense model's: give recall= instead of kl="
        )
    logits: Array
    swaps, name = with_logits(swaps, place)
    logits = rewrite(analysis.trace, swaps)(inputs)[1][name][1]
    return logits
