"""Cache of traces and plans of a function, one per set of input shapes and trace context."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import Mesh

from hire_rewrite import _compat
from hire_rewrite.analysis import Analysis
from hire_rewrite.arguments import check_call, not_traced, without_weights
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.trace import Trace, abstract, placed, trace, trace_context
from hire_rewrite.log import timed
from hire_rewrite.origin import Origin
from hire_rewrite.packed import Packed
from hire_rewrite.passes.decide import OtherLayout, decide
from hire_rewrite.passes.detect import Detection, detect
from hire_rewrite.passes.misses import (
    absent_sites,
    closed_over,
    idle_rules,
    unlisted_weights,
    unused_rules,
)
from hire_rewrite.passes.state import state_among_weights
from hire_rewrite.plan import Plan
from hire_rewrite.recent import Recent
from hire_rewrite.rules import Rule
from hire_rewrite.sites import site_kinds

REMEMBERED = 256
"""Analyses of one function that are kept: of others it is traced again."""


@dataclasses.dataclass(eq=False)
class Analyses:
    """The analyses of one function, each made once.

    Attributes:
      weights: the positions of the arguments that hold weights.
      mesh: where to shard the rows of sites whose weights are not sharded.
      on_miss, warn: what to do when a rule rewrites nothing, and how: `warn` is given a message and
        what it is told apart by.
      exact: whether sites on raw weights have their exact form, whether that pays or not.
      lock: held by the thread that makes an analysis, or packs weights at first sight.
      watch: called with each analysis that is asked for, and for what call: `self`, and what `of`
        returns and is given.
      forgets: called where analyses are forgotten, as an array that the function closes over is
        another one.
    """

    fn: Callable[..., Any]
    name: str
    rules: tuple[Rule, ...]
    weights: tuple[int, ...]
    mesh: Mesh | None
    on_miss: str
    warn: Callable[[str, Hashable], None]
    exact: bool = False
    watch: Callable[[Analyses, Analysis, Packed | None, Any, Any], None] = lambda *_: None
    forgets: Callable[[], None] = lambda: None
    lock: AbstractContextManager[Any] = dataclasses.field(
        default_factory=threading.RLock, init=False, repr=False
    )
    _known: dict[Any, Analysis] = dataclasses.field(
        default_factory=lambda: Recent(REMEMBERED), init=False
    )
    _detections: dict[Any, tuple[Trace, Detection]] = dataclasses.field(
        default_factory=lambda: Recent(REMEMBERED), init=False
    )

    def again(self, rules: tuple[Rule, ...]) -> Analyses:
        """Those of the same function with other rules."""
        return dataclasses.replace(self, rules=rules, on_miss="ignore")

    def of(
        self,
        packed: Packed | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        statistics: Mapping[str, Any] | None = None,
    ) -> Analysis:
        """The analysis of a call.

        Args:
          packed: the `Packed` that stands for the weights among `args`, if one does.
          args, kwargs: arrays or shapes.
          statistics: what calibration told, if there is no `Packed` to tell it.

        Raises:
          HireRewriteError: the `Packed` was made for something else.
        """
        full = list(args) if packed is None else self._with_origin(packed, args)
        try:
            leaves, tree = jax.tree.flatten(self._typed(full, kwargs))
        except TypeError:
            trace(self.fn, full, kwargs, self.weights)  # raises the error that names the leaf
            raise
        traced = ((trace_context(), site_kinds()), tree, tuple(leaves))
        told = packed.info if packed is not None else tuple(sorted((statistics or {}).items()))
        analysis = self._known.get((traced, told))
        if analysis is None:
            with self.lock:  # of several threads one makes it
                analysis = self._known.get((traced, told))
                if analysis is None:
                    analysis = self._new(traced, packed, statistics or {})
                    self._known[traced, told] = analysis
        if packed is not None:
            packed.check()
        self.watch(self, analysis, packed, args, kwargs)
        return analysis

    def _typed(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments as shapes, those of weights with their places."""
        kinds = (placed if i in self.weights else abstract for i in range(len(args)))
        typed = tuple(jax.tree.map(kind, arg) for kind, arg in zip(kinds, args, strict=True))
        return typed, jax.tree.map(abstract, dict(kwargs))

    def of_now(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Analysis:
        """The analysis of a call with raw weights, of the arrays that the function closes over now;
        those of other arrays are forgotten."""
        with self.lock:
            before = [graph for graph, _ in self._detections.values() if graph.closed_over]
            analysis = self.of(None, args, kwargs)
            now = analysis.trace
            if any(graph is now for graph in before):
                now = self._trace(*self._typed(args, kwargs), None)
            if all(graph.closed_over.all_among(now.closed_over) for graph in before):
                return analysis
            self._known.clear()
            self._detections.clear()
            self.forgets()
            return self.of(None, args, kwargs)

    def examined(
        self, analysis: Analysis, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Any
    ) -> Analysis:
        """An analysis of raw weights that knows what their numbers tell."""
        with timed(self.name, "examine") as found:
            told = analysis.examined(weights)
            found("looked at the numbers of %d site(s)", len(told))
        if not told:
            return analysis
        return self.of(None, args, kwargs, {**analysis.statistics, **told})

    def _with_origin(self, packed: Packed, args: Sequence[Any]) -> list[Any]:
        """The arguments with the shapes that a `Packed` was made of in its place; inside a
        `shard_map` they differ from device to device if any of its arrays does."""
        origin = packed.info.origin
        specs = _compat.varying_shapes(origin.specs, jax.tree.leaves(packed))
        originals = jax.tree.unflatten(origin.tree, specs)
        if len(originals) != len(self.weights):
            raise HireRewriteError(
                f"{self.name}: the Packed was made of {len(originals)} weight arguments, "
                f"but this function has {len(self.weights)}: pack with this function"
            )
        full = list(args)
        for position, original in zip(self.weights, originals, strict=True):
            full[position] = original
        return full

    def _new(
        self, traced: tuple[Any, Any, Any], packed: Packed | None, statistics: Mapping[str, Any]
    ) -> Analysis:
        _, tree, specs = traced
        args, kwargs = jax.tree.unflatten(tree, specs)
        graph, detection = found = self._detections.get(traced) or self._detect(
            args, kwargs, packed
        )
        info = None if packed is None else packed.info
        with timed(self.name, "decide") as told:
            try:
                plan, decisions = decide(detection, self.rules, statistics, info)
            except OtherLayout as error:
                raise HireRewriteError(str(error)) from None
            rewritten = ", ".join(site.name for site in plan.rewritten)
            told("%d site(s), rewritten: %s", len(plan.sites), rewritten or "none")
        explained = False  # why nothing is rewritten
        if packed is None:
            packs = any(decision.packs for decision in decisions)
            forgotten = closed_over(graph, self.weights)
            if forgotten is None and not packs:
                forgotten = unlisted_weights(graph, self.weights)
            explained = not packs and forgotten is not None
            # What stands in the place of the weights is not state among weights.
            hint = forgotten or state_among_weights(graph)
            plan = plan if hint is None else dataclasses.replace(plan, hints=(hint,))
        misses = unused_rules(plan, decisions) + absent_sites(decisions)
        if packed is None and not explained:
            misses += idle_rules(plan, decisions, self.rules, exact=self.exact)
        self._report(misses, plan)
        leaves, tree = jax.tree.flatten(tuple(args[i] for i in self.weights))
        leaves = list(map(_compat.invariant_shape, leaves))
        paths = tuple(graph.paths[i] for i in graph.weights)
        origin = Origin(tree, paths, tuple(leaves), (without_weights(args, self.weights), kwargs))
        self._detections[traced] = found  # not before nothing can fail: it may not be seen again
        return Analysis(graph, detection, plan, decisions, origin, statistics)

    def _trace(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], packed: Packed | None
    ) -> Trace:
        check_call(self.fn, self.name, args, kwargs)
        try:
            with timed(self.name, "trace") as found:
                graph = trace(self.fn, args, kwargs, self.weights)
                found("%d weight array(s) of %d inputs", len(graph.weights), len(graph.paths))
                return graph
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            if isinstance(error, HireRewriteError):
                raise
            message = not_traced(self.fn, error, args, self.weights, packed is not None)
            if message is None:
                raise
            raise HireRewriteError(f"{self.name}: {message}") from error

    def _detect(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], packed: Packed | None
    ) -> tuple[Trace, Detection]:
        graph = self._trace(args, kwargs, packed)
        with timed(self.name, "detect") as found, jax.transfer_guard("allow"):
            detection = detect(graph, self.rules, self.mesh)
            found(
                "%d site(s), %d linear layer(s) in none", len(detection.sites),
                len(detection.rejected),
            )  # fmt: skip
        return graph, detection

    def _report(self, misses: Sequence[tuple[Hashable, str]], plan: Plan) -> None:
        """Say what is missed, as `on_miss` asks for."""
        if self.on_miss == "ignore":
            return
        misses = [*misses, *((("hint", hint), hint) for hint in plan.hints)]
        if misses and self.on_miss == "raise":
            raise HireRewriteError(f"{self.name}: " + "; ".join(text for _, text in misses))
        for key, text in misses:
            self.warn(f'{text} (on_miss="ignore" is silent about it)', key)

    def weight_arguments(self, weights: Any) -> tuple[Any, ...]:
        """The arguments that hold weights, in order: one, or a tuple of several."""
        if isinstance(weights, Packed):
            raise HireRewriteError(
                f"{self.name}: a Packed was given where the weights are wanted that it was made "
                "of: give those"
            )
        arguments = (weights,) if len(self.weights) == 1 else weights
        if not isinstance(arguments, tuple | list) or len(arguments) != len(self.weights):
            listed = isinstance(arguments, tuple | list)
            given = f"{len(arguments)} in a " if listed else "a "
            raise HireRewriteError(
                f"{self.name}: the weight arguments are {given}{type(weights).__name__}, and the "
                f"function has {len(self.weights)}: give a tuple of them"
            )
        return tuple(arguments)

    def joined(self, args: Sequence[Any] | Mapping[int, Any], batch: Sequence[Any]) -> list[Any]:
        """A batch with the weights among `args` in their places.

        Raises:
          HireRewriteError: it has too few arguments for these places.
        """
        if len(batch) + len(self.weights) <= max(self.weights, default=-1):
            raise HireRewriteError(
                f"{self.name}: a batch has {len(batch)} argument(s), and weights={self.weights}: "
                "give a tuple of all arguments but the weights"
            )
        rest, count = iter(batch), len(batch) + len(self.weights)
        return [args[i] if i in self.weights else next(rest) for i in range(count)]

    def without_weights(self, args: tuple[Any, ...], packed: Packed | None) -> tuple[Any, ...]:
        """`args` with None for the weights where a `Packed` stands for them."""
        if packed is None:
            return args
        return tuple(None if i in self.weights else arg for i, arg in enumerate(args))
