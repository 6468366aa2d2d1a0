"""Choose for each site the predictor and the candidates that read least and recall enough."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.analysis import Analyses
from hire_rewrite.batches import calibrate, measure
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.predictors import Cascade, LowRank, Predictor, Quantized, certifies
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.sizes import scored_rows
from hire_rewrite.plan import table
from hire_rewrite.report import SiteReport
from hire_rewrite.rules import FFN, Head, Rule
from hire_rewrite.saved import save_rules

__all__ = ["Trial", "Tunable", "Tuned", "choose", "held_out", "predictors_for", "tunable", "tune"]

_MARGIN = 0.5
"""The part of the misses allowed that may be used up on the held-out batches. The rest is left for
text of other kinds, on which fitted predictors miss more."""

_RANKS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 1 / 3)
"""Ranks that are tried, as parts of d."""


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A site whose predictor can be chosen.

    Attributes:
      unit: rows that are candidates together: neurons of a group, or 1.
      rows, d: the size of the matrix whose products are guessed.
    """

    name: str
    rule: Rule
    unit: int
    rows: int
    d: int

    def probe(self) -> Rule:
        """A rule for this site alone that calibration tells everything about."""
        rule = self.trial(Quantized())
        certified = isinstance(rule, Head) and rule.certify
        return rule if certified else dataclasses.replace(rule, predictor=LowRank())

    def trial(self, predictor: Predictor) -> Rule:
        """The rule for this site alone with another predictor."""
        path = f"^{re.escape(self.name)}$"
        return dataclasses.replace(self.rule, predictor=predictor, path=path, force=True)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A predictor at a site, with the fewest candidates that recall enough.

    Attributes:
      rule: for the site alone.
      bytes: weight bytes that one token reads, in all layers.
      recall: on the held-out batches, in the worst layer.
    """

    name: str
    rule: Rule
    bytes: int
    recall: float


class Tuned(tuple[Rule, ...]):
    """The rules that tuning found, first those of the sites; a tuple for `transform(fn, *rules)`.

    Attributes:
      chosen: the winner at each site.
      trials: everything that was tried, in the same order of sites.
    """

    chosen: tuple[Trial, ...]
    trials: tuple[Trial, ...]

    def __new__(
        cls, rules: Iterable[Rule], chosen: Iterable[Trial] = (), trials: Iterable[Trial] = ()
    ) -> Tuned:
        found = super().__new__(cls, rules)
        found.chosen, found.trials = tuple(chosen), tuple(trials)
        return found

    def __str__(self) -> str:
        rows = [
            [trial.name, str(trial.rule.predictor), str(trial.rule.candidates),
             f"{trial.recall:.4f}", f"{trial.bytes / 1e6:.2f}"]
            for trial in self.chosen
        ]  # fmt: skip
        return table([["site", "predictor", "candidates", "recall", "MB read"], *rows])

    def save(self, path: str) -> None:
        """Write the rules to a JSON file, which `load_rules` reads."""
        save_rules(self, path)


def predictors_for(site: Tunable, tokens: int) -> list[Predictor]:
    """What is worth trying at a site that is calibrated on so many tokens."""
    n, d = site.rows, site.d
    most = min(n, d, tokens)
    ranks = sorted({max(8, round(d * share / 8) * 8) for share in _RANKS})
    ranks = [rank for rank in ranks if rank <= most]
    found: list[Predictor] = [LowRank(rank) for rank in ranks]
    found.append(Quantized())
    if d % 32 == 0:
        found.append(Quantized(4))
    if not isinstance(site.rule, FFN):
        keep = max(1024, n // 24)
        found += [Cascade(LowRank(rank), Quantized(), keep) for rank in ranks if 4 * keep <= n]
    if isinstance(site.rule, Head) and site.rule.certify:
        found = [predictor for predictor in found if certifies(predictor)]
    return found


def tunable(decisions: Sequence[Decision]) -> list[Tunable]:
    """The sites that a rule asks for, with their sizes written out in the rule."""
    found = []
    for decision in decisions:
        spec, rule = decision.spec, decision.site.rule
        if spec is None or rule is None:
            continue
        unit = 1
        if isinstance(spec, FFNSpec):
            unit = spec.group
            if not decision.undecided:
                assert isinstance(rule, FFN)
                candidates = spec.candidate_groups * unit
                rule = dataclasses.replace(
                    rule, k=spec.k_groups * unit, candidates=candidates, group=unit
                )
        d = decision.found.match.linears[0].in_dim
        found.append(Tunable(decision.found.name, rule, unit, scored_rows(spec), d))
    return found


def choose(
    sites: Sequence[Tunable],
    recall: float,
    tokens: int,
    measure: Callable[[Sequence[Rule]], Sequence[SiteReport]],
) -> tuple[list[Trial], list[Trial]]:
    """The best trial of each site, and all trials.

    Args:
      recall: the share of the true top k that each layer of a site must find, on average.
      tokens: how many the predictors are calibrated on.
      measure: rules, one for each of some sites, to what the held-out batches say about them.
    """
    target = 1.0 - (1.0 - recall) * _MARGIN
    options = {site.name: predictors_for(site, tokens) for site in sites}
    trials: dict[str, list[Trial]] = {site.name: [] for site in sites}
    for turn in range(max(map(len, options.values()), default=0)):
        rules = {
            site.name: site.trial(options[site.name][turn])
            for site in sites
            if turn < len(options[site.name])
        }
        reports = {report.name: report for report in measure(list(rules.values()))}
        for site in sites:
            if site.name in rules and site.name in reports:
                rule = rules[site.name]
                trials[site.name].append(_trial(site, rule, reports[site.name], target))
    chosen = [min(own, key=lambda trial: trial.bytes) for own in trials.values() if own]
    return chosen, [trial for own in trials.values() for trial in own]


def _trial(site: Tunable, rule: Rule, report: SiteReport, target: float) -> Trial:
    enough = (point for point in report.curve if min(point[2]) >= target)
    # All units are candidates at the end of the curve, and nothing is missed.
    candidates, size, recalls = next(enough, report.curve[-1])
    settled = dataclasses.replace(rule, candidates=candidates * site.unit, force=site.rule.force)
    return Trial(site.name, settled, size, min(recalls))


def held_out(batches: Iterable[tuple[object, ...]]) -> tuple[list, list]:  # type: ignore[type-arg]
    """Batches to fit predictors to, and others to measure them on: every fourth, or the last."""
    every = list(batches)
    if len(every) < 2:
        raise HireRewriteError(
            f"tune: {len(every)} batch(es): give at least 2, since a part is held out to measure "
            "recall on text that the predictors were not fitted to"
        )
    out = [i for i in range(len(every)) if i % 4 == 3] or [len(every) - 1]
    return [b for i, b in enumerate(every) if i not in out], [every[i] for i in out]


def tune(
    analyses: Analyses,
    weights: Any,
    batches: Iterable[tuple[Any, ...]],
    recall: float,
    kwargs: Mapping[str, Any],
) -> Tuned:
    """The rules that `Transformed.tune` returns."""
    if not 0.0 < recall < 1.0:
        raise HireRewriteError(f"tune: recall={recall!r} must be between 0 and 1")
    fitting, other = held_out(batches)
    given = dict(zip(analyses.weights, _as_arguments(weights, analyses.weights), strict=True))
    args = analyses.joined(given, fitting[0])
    sites = tunable(analyses.of(None, args, kwargs).decisions)
    if not sites:
        raise HireRewriteError(
            f"tune: no rule asks for a site of {analyses.name}: look at .plan(...)"
        )
    counts = (analyses.of(None, analyses.joined(given, b), kwargs).decisions for b in fitting)
    tokens = sum(min(decision.found.tokens for decision in found) for found in counts)

    probe = analyses.again(tuple(site.probe() for site in sites))
    _, seen = calibrate(probe, args, kwargs, fitting)

    def measured(rules: Sequence[Rule]) -> Sequence[SiteReport]:
        own = analyses.again(tuple(rules))
        analysis = own.of(None, args, kwargs, seen.learnings)
        packed = analysis.pack(jax.tree.leaves([args[i] for i in analyses.weights]), seen)
        return measure(own, packed, other, None, kwargs, sites_only=True).sites

    chosen, trials = choose(sites, recall, tokens, measured)
    # Default rules spare blocks that are not sparse; written out they would not.
    return Tuned((*(trial.rule for trial in chosen), *analyses.rules), chosen, trials)


def _as_arguments(weights: Any, positions: Sequence[int]) -> tuple[Any, ...]:
    """The arguments that hold weights, in order."""
    found = (weights,) if len(positions) == 1 else tuple(weights)
    if len(found) != len(positions):
        raise HireRewriteError(
            f"tune: {len(found)} weight argument(s), but the function has {len(positions)}: give a "
            "tuple of them"
        )
    return found
