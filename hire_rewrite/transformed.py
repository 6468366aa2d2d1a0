"""A transformed function: traces, plans, packs and runs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from hire_rewrite.analyses import Analyses
from hire_rewrite.analysis import Analysis
from hire_rewrite.arguments import check_numbers, check_to_pack, packed_among
from hire_rewrite.changes import compared
from hire_rewrite.errors import HireRewriteError, Warner
from hire_rewrite.graph.trace import abstract, placed
from hire_rewrite.log import timed
from hire_rewrite.packed import Packed, check_arrays, check_devices, check_not_deleted
from hire_rewrite.passes.budget import tune_within
from hire_rewrite.passes.calibrate import calibrate
from hire_rewrite.passes.diff import Diff
from hire_rewrite.passes.evaluate import evaluate
from hire_rewrite.passes.modes import Mode
from hire_rewrite.passes.tune import tune
from hire_rewrite.plan import Plan
from hire_rewrite.positional import by_position
from hire_rewrite.recent import Recent
from hire_rewrite.report import Report
from hire_rewrite.rules import Rule
from hire_rewrite.run import Runner
from hire_rewrite.sight import OnSight, traced, tracing
from hire_rewrite.tuned import Tuned

_INSTANCES = 64
"""Instances whose methods are known; they are held, and so is what was packed for them."""


class Transformed:
    """A function with its sites rewritten; made by `hire_rewrite.transform`.

    Call it like the function, with a `Packed` where the weights stood. (With several weight
    arguments it stands in the place of the first, and the others are None.) Raw weights work too:
    arrays are packed on first sight; inside an outer trace the predictors are computed in the
    graph, at every call. Both warn once.

    It traces the function once for each set of shapes, and is compiled by `jax.jit` unless it is
    traced itself; for donation, wrap it: `jax.jit(step, donate_argnums=2)`.

    With `telemetry=True` a call returns a pair: what the function returns, and a `Telemetry`.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        rules: tuple[Rule, ...],
        weights: tuple[int, ...],
        mesh: Mesh | None,
        mode: Mode,
        on_miss: str,
        telemetry: bool | float = False,
    ) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.name = getattr(fn, "__name__", None) or type(fn).__name__
        self.fn, self.rules, self.weights, self.mode = fn, rules, weights, mode
        self._warn = Warner(self.name)
        self._settings = rules, weights, mesh, mode, on_miss, telemetry
        self._bound: Recent[int, tuple[Any, Transformed]] = Recent(_INSTANCES)
        self._analyses = Analyses(
            fn, self.name, rules, weights, mesh, on_miss, self._warn,
            exact=not mode.packs_on_sight, watch=self._dump,
            forgets=self._compile,
        )  # fmt: skip
        self._sight = OnSight(self._analyses, self._warn)
        self._runner = Runner(fn, self.name, self._analyses, mode, telemetry, self._warn)
        self._compile()

    def _compile(self) -> None:
        """Forget what was compiled, if anything was."""
        self._compiled = self._jitted(None)
        # Inside a jit nobody would know how raw weights lie on a mesh: it gets the analysis.
        self._compiled_for = functools.lru_cache(256)(self._jitted)

    def _jitted(self, analysis: Analysis | None) -> Callable[..., Any]:
        """A call, compiled. Of a new function each time: JAX would find what it traced before."""
        run = self._runner.run

        def call(packed: Packed | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            return run(packed, args, kwargs, analysis)

        call.__name__ = call.__qualname__ = self.name  # as profiles and errors have it
        return jax.jit(call)

    def __copy__(self) -> Transformed:
        """Itself, as of a function."""
        return self

    def __deepcopy__(self, memo: Any) -> Transformed:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        """By its name, as a function, where that is its own; or made again of its function."""
        path: str = getattr(self, "__qualname__", "")
        named: Any = sys.modules.get(self.__module__)
        for name in path.split("."):
            named = getattr(named, name, None)
        return path if named is self else (Transformed, (self.fn, *self._settings))

    def __get__(self, instance: Any, owner: type | None = None) -> Transformed:
        """The transformed method of an instance: `weights` counts the arguments after `self`."""
        if instance is None:
            return self
        if not hasattr(self.fn, "__get__"):  # nor would it be bound as it was
            return self
        known, bound = self._bound.get(id(instance), (None, None))
        if bound is None or known is not instance:
            bound = Transformed(self.fn.__get__(instance, owner), *self._settings)
            self._bound[id(instance)] = instance, bound
        return bound

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        packed = self._packed_among(args, kwargs)
        if packed is None and self.mode.packs_on_sight:
            packed = self._sight.pack(tuple(self._weight_leaves(args)), args, kwargs)
        operands = (packed, self._analyses.without_weights(args, packed), kwargs)
        # Under a trace the code goes straight into it, so that nothing is nested without need.
        if tracing() and traced(jax.tree.leaves(operands)):
            return self._runner.run(*operands)
        if packed is None and self.mode.exact_form:
            return self._compiled_for(self._analyses.of(None, args, kwargs))(*operands)
        try:
            return self._compiled(*operands)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            check_arrays(self.name, packed)
            check_numbers(self.fn, self.name, operands[1], kwargs)
            if "devices" in str(error):
                check_devices(self.name, packed)
            raise

    def plan(self, /, *args: Any, **kwargs: Any) -> Plan:
        """What will be done, for a call with these arguments (arrays or shapes)."""
        packed = self._packed_among(args, kwargs)
        return self._analyses.of(packed, args, kwargs).plan

    def pack(
        self,
        /,
        *args: Any,
        calibration: Iterable[tuple[Any, ...]] | None = None,
        **kwargs: Any,
    ) -> Packed:
        """Pack the weights: lay out the rows of the sites and fit their predictors.

        Args:
          args, kwargs: a call's arguments: the weights, and arrays or shapes for the rest. If
            weights are shapes too, so is the `Packed`, with shardings if theirs have some: for
            compiling ahead of time, or to restore a checkpoint.
          calibration: tuples of the arguments after the weights, on which the predictors are
            fitted; leading sizes (batch, sequence) may differ from call to call. Without it a
            `LowRank` predictor is the plain SVD of the weights, which recalls badly. An argument of
            the function's own that is called so is given by its position.

        Returns:
          The `Packed` to pass where the weights stood. A function whose weights are closed over
          (`weights=()`) keeps it and is called as before; after an update of them pack again.

        Raises:
          HireRewriteError: a calibration batch has another structure than the call, or holds a
            NaN or an infinity; a weight does; or a rule needs calibration and there is none.
        """
        if self._packed_among(args, kwargs) is not None:
            raise HireRewriteError(
                f"{self.name}: pack has a Packed where the weights stand that it is to be made of: "
                "give those"
            )
        leaves = self._weight_leaves(args)
        shapes = check_to_pack(self.name, leaves, calibrated=calibration is not None)
        analysis, seen = self._analyses.of_now(args, kwargs), None
        check_not_deleted("pack", analysis.origin.paths, leaves)
        if calibration is not None:
            with timed(self.name, "calibrate") as found, jax.transfer_guard("allow"):
                analysis, seen = calibrate(self._analyses, args, kwargs, calibration)
                found("%d site(s)", len(seen.sites))
        else:
            analysis.check_decided()
        if seen is None and not shapes and analysis.wants_calibration:
            self._warn(
                "packing without calibration: LowRank predictors are plain SVDs of the weights and "
                "will recall badly; give pack(..., calibration=batches)"
            )
        analysis = self._analyses.examined(analysis, args, kwargs, leaves)
        with timed(self.name, "pack") as found:
            packed = analysis.pack([placed(leaf) for leaf in leaves] if shapes else leaves, seen)
            found("%r", packed)
        if not self.weights and not shapes:
            self._sight.keep(packed)
        return packed

    @by_position
    def evaluate(
        self,
        packed: Packed,
        batches: Iterable[tuple[Any, ...]],
        /,
        *,
        weights: Any = None,
        targets: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Report:
        """Measure what rewriting misses: each site, and the model beside the dense and exact one.

        Every token is measured as if it were decoded alone, however many a batch has and whatever
        `max_tokens` says, so that whole sequences can be given. The calls of such batches
        themselves may lose less: `Report.stay_dense` names the sites that are dense in them, and a
        `Linear` or `FFN` with exact parts reads more rows exactly for more tokens.

        Args:
          packed, batches: by position; tuples of the arguments after the weights, as in `pack`.
          weights: what `packed` was made of, as in `tune`. Needed where it holds a rounded copy of
            a weight alone: what it is compared with is the model on these.
          targets: a batch's arguments to the true class of each row of logits, integers of any
            shape in the order of the logits; negative where there is none. For perplexity. If the
            logits are a part of the vocabulary, classes in the rest of it count as none.
          kwargs: the call's keyword arguments.

        Returns:
          A `Report`; `print` it, or see `to_json`.

        Raises:
          HireRewriteError: `packed` is not a `Packed`, there is no batch, targets do not fit (or
            are not integers, or not in the vocabulary), the weights are needed, or the dense
            model's logits hold a NaN or infinity for a token of a batch (−infinity is fine: masked
            tokens). Where the rewritten model's alone do, the token is no agreement, and `kl` NaN.
        """
        if not isinstance(packed, Packed):
            what = f"{self.name}: evaluate needs a Packed, not {type(packed).__name__}"
            raise HireRewriteError(f"{what}: make it with .pack(...)")
        check_arrays(self.name, packed)
        leaves = None
        if weights is not None:
            arguments = self._analyses.weight_arguments(weights)
            packed._check_origin("evaluate", arguments, known=False)
            leaves = jax.tree.leaves(arguments)
        with timed(self.name, "evaluate") as found, jax.transfer_guard("allow"):
            report = evaluate(self._analyses, packed, batches, leaves, targets, kwargs)
            found("%d site(s)", len(report.sites))
        return report

    @by_position
    def tune(
        self,
        weights: Any,
        batches: Iterable[tuple[Any, ...]],
        /,
        *,
        recall: float | None = None,
        kl: float | None = None,
        seconds: float | None = None,
        **kwargs: Any,
    ) -> Tuned:
        """Choose the rules of the sites: the fastest within a budget of divergence or recall.

        With `kl`, for models that somebody else trained: encodings, k and predictors of all sites
        (those that this function's rules ask for, if it has some). Each choice is measured alone
        on a quarter of the batches, the whole on the others; every token as in `evaluate`, as if it
        were decoded alone.

        With `recall`, for models that were trained with a top-k: of each site the predictor and
        the candidates that read least and recall enough. Sites, k and groups are those of this
        function's rules. Several predictors are fitted to most of the batches and measured on the
        others, which is a quarter of them.

        Args:
          weights: the argument that holds weights, a tuple of them if there are several, or () if
            they are closed over. By position, as batches are.
          batches: at least two tuples of the arguments after the weights, as in `pack`.
          recall: the share of the true top k that is to be found, on average over tokens, in each
            layer of each site. On the held-out batches half of the misses allowed are left, for
            other text. 0.99 if neither is given.
          kl: how far the rewritten model may diverge from the dense one, in nats a token: the mean
            of KL(dense ‖ rewritten). Needs a vocabulary head outside of loops.
          seconds: with `kl`, about how long it may take; None for as long as it takes: a trial
            compiles the model and runs it, and there are about eight for each kind of layer.
            Layers that differ in numbers of their names alone are tried together. Those that read
            most are tried first, and each once before any a second time; when time is up the
            fastest within `kl` of what was tried is returned, with a warning.
          kwargs: the call's keyword arguments.

        Returns:
          The rules as a tuple, for `transform(fn, *rules)`; `print` them, or `save` them.

        Raises:
          HireRewriteError: there are fewer than two batches, no site that a rule asks for, both
            budgets are given, `seconds` without `kl`, nothing that was tried is within `kl`, or
            what the dense model computes for a token of a batch is NaN.
        """
        if kl is None and seconds is not None:
            raise HireRewriteError(
                f"{self.name}: tune has seconds= without kl=, whose trials it limits: give both, "
                "or no seconds="
            )
        if kl is not None and recall is not None:
            raise HireRewriteError(f"{self.name}: tune has recall= and kl=: give one of them")
        with timed(self.name, "tune") as found, jax.transfer_guard("allow"):
            if kl is None:
                recall = 0.99 if recall is None else recall
                tuned = tune(self._analyses, weights, batches, recall, kwargs)
            else:
                tuned = tune_within(self._analyses, weights, batches, kl, seconds, kwargs)
            found("%d rule(s)", len(tuned))
        return tuned

    def diff(self, /, *args: Any, **kwargs: Any) -> Diff:
        """The jaxpr of a call with these arguments (arrays or shapes), before and after.

        Examples:
          >>> import jax.numpy as jnp, hire_rewrite as hire
          >>> fn = lambda params, x: x @ params["vocabulary"]
          >>> step = hire.transform(fn, hire.Head(k=4, candidates=8, min_width=1, force=True))
          >>> params = {"vocabulary": jnp.sin(jnp.arange(1024.0)).reshape(16, 64)}
          >>> changes = step.diff(params, jnp.ones((1, 16)))
          >>> changes.regions[0].sites[0].name
          'params/vocabulary'
        """
        packed = self._packed_among(args, kwargs)
        return self._diff(self._analyses.of(packed, args, kwargs), packed, args, kwargs)

    def _diff(
        self, analysis: Analysis, packed: Packed | None, args: Any, kwargs: Any, own: bool = True
    ) -> Diff:
        if packed is None and self.mode.packs_on_sight and analysis.packing:
            packed = analysis.pack(list(map(placed, self._weight_leaves(args))))
        rest = self._analyses.without_weights(tuple(args), packed)
        specs = jax.tree.map(abstract, (packed, rest, kwargs))
        # Another function than `run`: JAX traces none inside itself, and a dump is made in there.
        with timed(self.name, "diff") as found:
            settings: Any = {"marked": False, "counted": False}
            settings["analysis"] = None if own else analysis
            run = self._runner.run
            after = jax.make_jaxpr(lambda *operands: run(*operands, **settings))(*specs)
            changes = compared(analysis, self.name, packed, after)
            found("%r", changes)
        return changes

    # How it is restored: see `checkpoint`.

    def _restored(self, target: Packed, leaves: Iterable[jax.Array]) -> Packed:
        """A `Packed` of shapes with arrays in their places."""
        packed = jax.tree.unflatten(jax.tree.structure(target), list(leaves))
        if not self.weights:
            self._sight.keep(packed)
        return packed

    def _dump(
        self, analyses: Analyses, analysis: Analysis, packed: Packed | None, args: Any, kwargs: Any
    ) -> None:
        """An analysis in files too, if `HIRE_DUMP_TO` asks for that."""
        if folder := os.environ.get("HIRE_DUMP_TO"):
            from hire_rewrite.dump import dump

            own = analyses is self._analyses  # others have other rules
            diff = functools.partial(self._diff, analysis, packed, args, kwargs, own=own)
            dump(folder, self.name, analysis, diff)

    def _packed_among(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Packed | None:
        return packed_among(self.name, self.weights, args, kwargs)

    def _weight_leaves(self, args: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves([args[i] for i in self.weights])
