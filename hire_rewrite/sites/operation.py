"""What a site is rewritten to: the protocol of an operation, and what operations share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat
from hire_rewrite.cost.machine import Machine
from hire_rewrite.graph.evaluate import run_node
from hire_rewrite.graph.nodes import Value
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors import LowRank, Predictor, Quantized, Read
from hire_rewrite.ops.quality import Measured, Quality, quality
from hire_rewrite.ops.usage import Usage, picked, recall_tally, tally
from hire_rewrite.patterns.region import to_tokens
from hire_rewrite.rules import Rule
from hire_rewrite.sites.kind import MatchedSite
from hire_rewrite.sites.replacement import Run, SiteReplacement, arguments
from hire_rewrite.sites.weight_rows import WeightRows

SiteCalibration = tuple[Moments, Any]
"""What calibration saw of a site: the moments of its input, and what its kind observes besides.
Both have a leading axis of layers."""


class Operation(abc.ABC):
    """A site's operation: what its weights are packed to, and what takes its place.

    Attributes:
      site, rule: what it was resolved from.
      undecided: why it cannot be run before calibration has told its sizes; None if it can.
      unexamined: what packing has to find out about its numbers first (see `examine`); None if
        nothing.
      unit: rows that are chosen together.
      k, candidates: in units, what is chosen and from how many; 0 where nothing is chosen.
      fixed_units: units that are candidates of every token.
      exact_is_dense: whether its exact form is the dense site.
      proves: whether it proves what it chooses.
      reads_vary: whether the data say how much it reads.
      calibrated_tokens: numbers of tokens in a call for which calibration told what they read.
    """

    site: MatchedSite
    rule: Rule
    undecided: str | None = None
    unexamined: str | None = None
    unit: int = 1
    k: int = 0
    candidates: int = 0
    fixed_units: int = 1
    exact_is_dense: bool = True
    proves: bool = False
    reads_vary: bool = False
    calibrated_tokens: tuple[int, ...] = ()

    @property
    @abc.abstractmethod
    def layout(self) -> Hashable:
        """All that its packed arrays depend on besides the weights; prints alike if equal."""

    @property
    @abc.abstractmethod
    def scored(self) -> tuple[int, int]:
        """The size n × d of the matrix whose products the predictor guesses."""

    @abc.abstractmethod
    def describe(self) -> str:
        """What it does, for the plan."""

    @abc.abstractmethod
    def reads(self, tokens: int) -> Sequence[Read]:
        """What one run reads for so many tokens, on one device, for one of its experts."""

    def overhead(self, machine: Machine) -> float:
        """Nanoseconds that one run takes besides its reads."""
        return machine.site

    @abc.abstractmethod
    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> Any:
        """The packed arrays, a pytree with a leading axis of layers.

        All that the site computes from its weights, in each mode, is computed from these: a weight
        stays beside them only where something else in the model reads it.

        Args:
          calibration: what calibration saw of the site, if it did.
          advance: called when a layer is done.

        Raises:
          HireRewriteError: the rule needs calibration and there is none.
        """

    def encoded(self, arrays: Any) -> Any:
        """What is kept of what `pack` returned, where a part of packing is for the host: in a
        manual region `pack` runs in a `shard_map`."""
        return arrays

    @property
    def examines(self) -> bool:
        """Whether packing has to look at its numbers (see `examine`)."""
        return self.unexamined is not None

    def examine(self, weights: WeightRows) -> Any:
        """What packing found out about the numbers, of an operation that `examines`: statistics for
        `SiteKind.resolve`, or `StaysDense`, both hashable; None where there is nothing to say."""
        raise NotImplementedError

    def rows(self, arrays: Any) -> Sequence[Any]:
        """What is stored of weights among the packed arrays, in which no number may be infinite;
        in any pytree, with integers or not."""
        return ()

    @abc.abstractmethod
    def rewritten(self, arrays: Any) -> list[SiteReplacement]:
        """Predict, gather, and compute: what takes the site's place in mode "hire"."""

    def counted(self, arrays: Any) -> list[SiteReplacement]:
        """`rewritten`, which reports a `tally` besides; one for each of its experts."""
        site, *others = self.rewritten(arrays)
        return [self.tallied(site, Usage()), *others]

    def sampled(self, arrays: Any, share: float) -> list[SiteReplacement]:
        """`counted`, which in about such a share of its runs measures its recall besides.

        Not where devices or experts run it by themselves: then nothing is measured.
        """
        counted, *others = self.counted(arrays)
        sharding = self.site.sharding
        together = sharding.mesh is None and sharding.region is None and self.site.experts == 1
        if not together or not self.chooses or counted.known:
            return [counted, *others]
        measured, *_ = self.measured(arrays, follow_exact=False)

        def run(ins: Sequence[Any], layer: Any, state: Any) -> tuple[Sequence[Any], Any]:
            results, counts = counted.run(ins, layer, state)
            operands = lax.stop_gradient((list(ins), layer, state))

            def measure() -> Any:
                return _compat.varying(recall_tally(measured.run(*operands)[1]))

            def nothing() -> Any:
                return _compat.varying(jnp.zeros_like(counts))

            return results, counts + lax.cond(picked(operands[0][0], share), measure, nothing)

        return [dataclasses.replace(counted, run=run), *others]

    def tallied(self, replacement: SiteReplacement, usage: Usage) -> SiteReplacement:
        """A replacement that reports a usage that no data decide."""
        site = self.site
        report = tally(site.tokens, usage)
        if site.experts > 1:
            report = jnp.broadcast_to(report, (site.experts, *report.shape))
        return dataclasses.replace(replacement, reports=True, known={site.name: report})

    @property
    def chooses(self) -> bool:
        """Whether it reads some units one by one, and not all."""
        return bool(self.k) or self.reads_vary

    @property
    def counted_units(self) -> int:
        """Of how many units a tally's `read` is, on one device."""
        return self.scored[0]

    @property
    def counted_by_call(self) -> bool:
        """Whether a tally counts units once for all tokens of a call, not once for each."""
        return False

    @abc.abstractmethod
    def exact(self, arrays: Any) -> list[SiteReplacement]:
        """The same meaning in dense arithmetic on the packed arrays."""

    @abc.abstractmethod
    def dense(self, arrays: Any) -> list[SiteReplacement]:
        """What the model computes, on the packed arrays."""

    @abc.abstractmethod
    def measured(self, arrays: Any, *, follow_exact: bool) -> list[SiteReplacement]:
        """`rewritten` as each token has it in a call of its own, whatever the number of tokens in
        this one, or `exact`; reports its `Quality` besides."""

    def exact_form(self) -> SiteReplacement | None:
        """`exact` on the weights as they are; None where that is the model's own code."""
        return None

    def observed(self) -> SiteReplacement:
        """The site as it is, or its first layer, which reports a `SiteCalibration`."""
        linear = self.site.linears[0]
        inputs = arguments(linear.node.ins)

        def run(ins: Sequence[Any], *_: Any) -> tuple[list[Any], SiteCalibration]:
            env = dict(zip(inputs, ins, strict=True))
            run_node(linear.node, env)
            moments = Moments.of(to_tokens(env[linear.x], linear.x_axes))
            return [env[linear.out]], (moments, None)

        site = self.replacement(run, None, reports=True)
        nodes = frozenset({linear.node})
        return dataclasses.replace(site, nodes=nodes, inputs=inputs, outputs=(linear.out,))

    @property
    def keeps_gradient(self) -> bool:
        """Whether the derivative of `rewritten` by the site's input is the model's."""
        return False

    @property
    def holds_weights(self) -> bool:
        """Whether `dense` is what the model computes: rounded copies alone are not enough."""
        return True

    def with_weights(self, arrays: Any, weights: WeightRows) -> Any:
        """Packed arrays with what `dense` needs besides, where they do not hold the weights."""
        return arrays

    def statistics(self, calibration: SiteCalibration) -> Hashable:
        """What calibration told, as static numbers that sizes and costs depend on."""
        return None

    @property
    def predictor(self) -> Predictor | None:
        """How the rows that matter are guessed; None where nothing but the rule's sizes does it."""
        return self.rule.predictor

    @property
    def fits(self) -> bool:
        """Whether it has a predictor that is fitted to activations."""
        predictor = self.predictor
        return predictor is not None and predictor.wants_calibration

    @property
    def learns(self) -> bool:
        """Whether calibration tells it anything."""
        return self.fits

    @property
    def needs_calibration(self) -> bool:
        """Whether it cannot be packed as its rule says without having been seen."""
        return self.fits

    def check(self, tokens: int | None = None) -> None:
        """Check its predictor's settings against its size, and the number of calibration tokens.

        Raises:
          HireRewriteError: they do not fit.
        """
        if self.predictor is not None:
            self.predictor.check(*self.scored, site=self.site.name, tokens=tokens)

    def partition_specs(self, arrays: Any) -> Any:
        """A `PartitionSpec` for each packed array, where rows are sharded over a mesh."""
        raise NotImplementedError

    def with_candidates(self, candidates: int) -> Operation:
        """The same with another number of candidates, where there are some."""
        return self

    def tuned_rule(self) -> Rule:
        """The rule with its sizes written out, from which tuning starts."""
        return self.rule

    def predictors(self, ranks: Sequence[int]) -> list[Predictor]:
        """The predictors that are worth a trial where rows are chosen, of low rank and others."""
        return [] if self.predictor is None else [self.predictor]

    def probe_predictor(self) -> Predictor | None:
        """A predictor that calibration tells everything about."""
        return self.predictor

    def described_choice(self, width: int, detail: str) -> str:
        """What is chosen of `width` rows, and how they are guessed."""
        predictor = self.predictor
        hint = " (calibrate it in pack)" if self.fits else ""
        return (
            f"top {self.k * self.unit} of {self.candidates * self.unit} candidates of {width}"
            f"{detail}, guessed by {predictor}{hint}{self.site.sharding.describe()}"
        )

    def replacement(self, run: Run, arrays: Any, *, reports: bool = False) -> SiteReplacement:
        """What takes the site's place: `run` of its inputs, the layer and its packed arrays."""
        match, name = self.site.match, self.site.name
        region, loops = self.site.sharding.region, self.site.loops
        return SiteReplacement(
            name, match.nodes, match.inputs, match.outputs, run, arrays, region, loops, reports
        )

    def raw_replacement(
        self, inputs: tuple[Value, ...], function: Callable[[Sequence[Any]], Sequence[Any]]
    ) -> SiteReplacement:
        """What takes the site's place on raw weights: `function` of some values, jitted."""
        match = self.site.match

        def run(ins: Sequence[Any], *_: Any) -> Any:
            return jax.jit(function)(ins), None

        return SiteReplacement(self.site.name, match.nodes, inputs, match.outputs, run)


def row_predictors(ranks: Sequence[int], d: int) -> list[Predictor]:
    """Predictors that are worth a trial for rows of length d: of these ranks, and of few bits."""
    packs = d % 32 == 0  # into blocks of 4 bits
    return [*map(LowRank, ranks), Quantized(), *([Quantized(4)] if packs else [])]


def silent(function: Callable[..., Any]) -> Callable[..., tuple[Any, None]]:
    """A function that reports nothing beside its result."""
    return lambda *args, **settings: (function(*args, **settings), None)


def counting(function: Callable[..., tuple[Any, Usage]]) -> Callable[..., tuple[Any, Array]]:
    """A function of tokens x: [tokens, d], ..., that reports the tally of what it read."""

    def run(x: Array, *args: Any, **settings: Any) -> tuple[Any, Array]:
        result, usage = function(x, *args, **settings)
        return result, tally(x.shape[0], usage)

    return run


def reporting(
    measured: Callable[..., Measured], follow_exact: bool, **settings: Any
) -> Callable[..., tuple[Any, Quality]]:
    """A measured operation that goes on with one of its results, and reports its quality."""

    def run(*args: Any, **more: Any) -> tuple[Any, Quality]:
        results = measured(*args, **settings, **more)
        chosen = results.exact if follow_exact else results.rewritten
        return chosen, quality(results.comparison)

    return run
