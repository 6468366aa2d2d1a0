"""A transformed function: traces, plans, packs and runs, and remembers what it found."""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.moments import Moments
from hire_rewrite.packed import Origin, Packed
from hire_rewrite.passes.calibrate import collect
from hire_rewrite.passes.decide import Decision, decide, min_width
from hire_rewrite.passes.detect import Found, detect
from hire_rewrite.passes.diff import Diff
from hire_rewrite.passes.pack import fingerprint, pack
from hire_rewrite.passes.replace import Functions, packed_replacements, raw_replacement
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.passes.trace import Trace, abstract, trace
from hire_rewrite.passes.weights import layers, site_loops
from hire_rewrite.plan import Plan
from hire_rewrite.rules import Rule

__all__ = ["Transformed"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Analysis:
    """What is known of the function at the shapes of one kind of call."""

    trace: Trace
    plan: Plan
    decisions: tuple[Decision, ...]
    origin: Origin
    functions: Functions = dataclasses.field(default_factory=dict)

    @property
    def packing(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.packs]

    @property
    def wants_calibration(self) -> bool:
        """Whether a predictor of the packed sites is fitted to activations."""
        rules = (decision.site.rule for decision in self.packing)
        return any(rule.predictor.wants_calibration for rule in rules if rule is not None)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.decisions, self.origin)

    def pack(self, weights: Sequence[Any], moments: Mapping[str, Moments]) -> Packed:
        return pack(self.trace, self.decisions, self.origin, weights, moments)

    def inputs(
        self, packed: Packed | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[int, Any]:
        """The arrays of the traced function's inputs, by number; weights as far as there are."""
        rest = jax.tree.leaves((tuple(args), kwargs))
        if packed is None:
            return dict(enumerate(rest))
        numbers = [i for i in range(len(self.trace.paths)) if i not in self.trace.weights]
        inputs = dict(zip(numbers, rest, strict=True))
        for i in self.trace.weights:
            if self.trace.paths[i] in packed.weights:
                inputs[i] = packed.weights[self.trace.paths[i]]
        return inputs


class Transformed:
    """A function with its sites rewritten; made by `hire_rewrite.transform`.

    Call it like the function, with a `Packed` where the weights stood. (With several weight
    arguments it stands in the place of the first, and the others are None.) Raw weights work too:
    arrays are packed on first sight; inside an outer trace the predictors are computed in the
    graph, at every call. Both warn once.

    It traces the function once for each set of shapes, and is compiled by `jax.jit` unless it is
    traced itself; for donation, wrap it: `jax.jit(step, donate_argnums=2)`.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        rules: tuple[Rule, ...],
        weights: tuple[int, ...],
        mode: str,
        on_miss: str,
    ) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.name = getattr(fn, "__name__", None) or type(fn).__name__
        self.fn = fn
        self.rules = rules
        self.weights = weights
        self.mode = mode
        self.on_miss = on_miss
        self._analyses: dict[Any, _Analysis] = {}
        self._seen: tuple[tuple[Any, ...], Packed] | None = None
        self._warned: set[str] = set()
        self._compiled = jax.jit(self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        packed, args = self._split(args)
        if packed is None and self.mode == "hire":
            packed = self._packed_on_sight(args, kwargs)
        operands = (packed, self._without_weights(args, packed), kwargs)
        # Under a trace the code goes straight into it, so that nothing is nested without need.
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(operands))
        return (self._run if traced else self._compiled)(*operands)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """What will be done, for a call with these arguments (arrays or shapes)."""
        packed, args = self._split(args)
        return self._analyze(packed, args, kwargs).plan

    def pack(
        self,
        *args: Any,
        calibration: Iterable[tuple[Any, ...]] | None = None,
        **kwargs: Any,
    ) -> Packed:
        """Pack the weights: lay out the rows of the sites and fit their predictors.

        Args:
          args, kwargs: a call's arguments: the weights, and arrays or shapes for the rest.
          calibration: tuples of the arguments after the weights, on which the predictors are
            fitted; leading sizes (batch, sequence) may differ from call to call. Without it a
            `LowRank` predictor is the plain SVD of the weights, which recalls badly.

        Returns:
          The `Packed` to pass where the weights stood. A function whose weights are closed over
          (`weights=()`) keeps it and is called as before.

        Raises:
          HireRewriteError: a calibration batch has another structure than the call, or holds a
            NaN or an infinity.
        """
        self._split(args)
        analysis = self._analyze(None, args, kwargs)
        moments = {}
        if calibration is not None:
            moments = self._calibrate(analysis, args, kwargs, calibration)
        elif analysis.wants_calibration:
            self._warn(
                "packing without calibration: LowRank predictors are plain SVDs of the weights and "
                "will recall badly; give pack(..., calibration=batches)"
            )
        packed = analysis.pack(self._weight_leaves(args), moments)
        if not self.weights:
            self._seen = ((), packed)
        return packed

    def diff(self, *args: Any, **kwargs: Any) -> Diff:
        """The jaxpr of a call with these arguments (arrays or shapes), before and after."""
        packed, args = self._split(args)
        analysis = self._analyze(packed, args, kwargs)
        if packed is None and self.mode == "hire" and analysis.packing:
            leaves = list(map(abstract, self._weight_leaves(args)))
            packed = jax.eval_shape(lambda arrays: analysis.pack(arrays, {}), leaves)
        rest = self._without_weights(args, packed)
        specs = jax.tree.map(abstract, (packed, rest, kwargs))
        return Diff(analysis.trace.closed, jax.make_jaxpr(self._run)(*specs))

    # How it runs.

    def _run(self, packed: Packed | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The function on a `Packed` (`args` have None for the weights) or on raw weights."""
        if packed is None and self.mode == "dense":
            return self.fn(*args, **kwargs)
        analysis = self._analyze(packed, args, kwargs)
        if packed is None and not analysis.packing:
            return self.fn(*args, **kwargs)
        inputs = analysis.inputs(packed, args, kwargs)
        if packed is None:
            swaps = [raw_replacement(decision) for decision in analysis.packing]
        else:
            swaps = [
                swap
                for d in analysis.packing
                for swap in packed_replacements(
                    analysis.trace, d, packed.sites[d.state], self.mode, analysis.functions
                )
            ]
        rewritten = rewrite(analysis.trace, swaps)
        missing = [analysis.trace.paths[i] for i in sorted(rewritten.needs - inputs.keys())]
        if missing:
            raise HireRewriteError(
                f"{self.name}: the Packed lacks {', '.join(missing)}, which this call reads "
                "outside the packed sites: pack for a call like this one"
            )
        results, _ = rewritten(inputs)
        return jax.tree.unflatten(analysis.trace.out_tree, results)

    def _packed_on_sight(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Packed | None:
        """A `Packed` made of the raw weights in `args`; None if no site asks for one."""
        leaves = tuple(self._weight_leaves(args))
        if self._seen is not None:
            seen, packed = self._seen
            if len(seen) == len(leaves) and all(map(operator.is_, seen, leaves)):
                return packed
        analysis = self._analyze(None, args, kwargs)
        if not analysis.packing:
            return None
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            self._warn(
                "raw weights inside an outer trace: the rows and predictors are computed in the "
                "graph at every call, which is slow; pack ahead with .pack(...) and pass the "
                "Packed in place of the weights"
            )
            return analysis.pack(leaves, {})
        hint = (
            ", without calibration, so LowRank predictors will recall badly"
            if analysis.wants_calibration
            else ""
        )
        self._warn(
            f"raw weights are packed on first sight{hint}; pack ahead with .pack(...) and pass the "
            "Packed in place of the weights"
        )
        with jax.ensure_compile_time_eval():
            packed = analysis.pack(leaves, {})
        if all(isinstance(leaf, jax.Array) for leaf in leaves):  # numpy's may change unseen
            self._seen = (leaves, packed)
        return packed

    def _split(self, args: tuple[Any, ...]) -> tuple[Packed | None, tuple[Any, ...]]:
        """The `Packed` among the arguments, if there is one, and the arguments."""
        for position in self.weights:
            if position >= len(args):
                raise HireRewriteError(
                    f"{self.name}: weights={position} but the call has {len(args)} positional "
                    "argument(s): give transform the position of the weights, or () if they are "
                    "closed over"
                )
        first = args[self.weights[0]] if self.weights else None
        return (first, args) if isinstance(first, Packed) else (None, args)

    def _without_weights(self, args: tuple[Any, ...], packed: Packed | None) -> tuple[Any, ...]:
        """`args` with None for the weights where a `Packed` stands for them."""
        if packed is None:
            return args
        return tuple(None if i in self.weights else arg for i, arg in enumerate(args))

    def _weight_leaves(self, args: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves([args[i] for i in self.weights])

    # What it knows.

    def _analyze(
        self, packed: Packed | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _Analysis:
        full = list(args)
        if packed is not None:
            originals = jax.tree.unflatten(packed.origin.tree, packed.origin.specs)
            if len(originals) != len(self.weights):
                raise HireRewriteError(
                    f"{self.name}: the Packed was made of {len(originals)} weight arguments, "
                    f"but this function has {len(self.weights)}: pack with this function"
                )
            for position, original in zip(self.weights, originals, strict=True):
                full[position] = original
        leaves, tree = jax.tree.flatten((tuple(full), dict(kwargs)))
        try:
            specs = tuple(map(abstract, leaves))
        except TypeError:
            trace(self.fn, full, kwargs, self.weights)  # raises the error that names the leaf
            raise
        key = (tree, specs)
        if key not in self._analyses:
            try:
                self._analyses[key] = self._new_analysis(*jax.tree.unflatten(tree, specs))
            except (TypeError, ValueError) as error:
                if packed is None or isinstance(error, HireRewriteError):
                    raise
                raise HireRewriteError(
                    f"{self.name}: the function cannot be traced with weights of the shapes that "
                    f"the Packed was made of ({str(error).splitlines()[0]}): if the other "
                    "arguments are right, pack again from this function's weights"
                ) from error
        analysis = self._analyses[key]
        if packed is None:
            return analysis
        if packed.fingerprint != analysis.fingerprint:
            raise HireRewriteError(
                f"{self.name}: the Packed was made for the plan {packed.fingerprint}, but this "
                f"call has the plan {analysis.fingerprint}: the rules, the sites or the shapes of "
                "the weights differ; pack again with this function"
            )
        packed.check()
        return analysis

    def _new_analysis(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Analysis:
        traced = trace(self.fn, args, kwargs, self.weights)
        plan, decisions = decide(detect(traced, min_width(self.rules)), self.rules)
        if plan.unused_rules and self.on_miss != "ignore":
            unused = ", ".join(map(str, plan.unused_rules))
            message = (
                f"no site of {self.name} fits {unused}: look at .plan(...), which says why "
                "each linear layer is what it is, and change the rule's path or sizes"
            )
            if self.on_miss == "raise":
                raise HireRewriteError(message)
            self._warn(message)
        leaves, tree = jax.tree.flatten(tuple(args[i] for i in self.weights))
        origin = Origin(tree, tuple(traced.paths[i] for i in traced.weights), tuple(leaves))
        return _Analysis(traced, plan, decisions, origin)

    def _calibrate(
        self,
        analysis: _Analysis,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        batches: Iterable[tuple[Any, ...]],
    ) -> dict[str, Any]:
        def join(batch: Sequence[Any]) -> list[Any]:
            rest = iter(batch)
            return [arg if i in self.weights else next(rest) for i, arg in enumerate(args)]

        def call(batch: tuple[Any, ...]) -> tuple[Trace, list[Found], list[Any]]:
            full = join(batch)
            other = self._analyze(None, full, kwargs)
            found = [decision.found for decision in other.decisions]
            return other.trace, found, jax.tree.leaves((tuple(full), kwargs))

        sites = {
            d.found.name: (d.state, layers(site_loops(analysis.trace, d.found.match)))
            for d in analysis.packing
            if d.site.rule is not None and d.site.rule.predictor.wants_calibration
        }
        example = [arg for i, arg in enumerate(args) if i not in self.weights]
        return collect(batches, example, sites, call)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{self.name}: {message}", stacklevel=3)
