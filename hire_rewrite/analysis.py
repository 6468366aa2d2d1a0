"""What is known of a function at the shapes of each kind of call, and what follows from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.learned import Learnings
from hire_rewrite.packed import Origin, Packed
from hire_rewrite.passes.ahead import pack_shapes
from hire_rewrite.passes.decide import Decision, decide, min_width
from hire_rewrite.passes.detect import Detection, detect
from hire_rewrite.passes.pack import Calibration, fingerprint, pack
from hire_rewrite.passes.raw import raw_replacement
from hire_rewrite.passes.replace import Functions, packed_replacements
from hire_rewrite.passes.trace import Trace, abstract, placed, trace
from hire_rewrite.plan import Plan
from hire_rewrite.rules import Rule
from hire_rewrite.sharding.placement import around_packing
from hire_rewrite.sites.replacement import SiteReplacement

__all__ = ["Analyses", "Analysis"]


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """The trace of a function, and the plan for it."""

    trace: Trace
    plan: Plan
    decisions: tuple[Decision, ...]
    origin: Origin
    functions: Functions = dataclasses.field(default_factory=dict)

    @property
    def packing(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.packs]

    @property
    def changes(self) -> bool:
        """Whether a call with raw weights differs from the function's own in mode "exact"."""
        return any(decision.asked for decision in self.decisions)

    @property
    def undecided(self) -> list[Decision]:
        """Sites whose k calibration has to find."""
        return [decision for decision in self.decisions if decision.undecided]

    def check_decided(self) -> None:
        """Raise HireRewriteError if a site's k is yet to be found."""
        for decision in self.undecided:
            raise HireRewriteError(
                f'{decision.found.name}: k="auto" is found by calibration: give '
                "pack(..., calibration=batches) and call with the Packed, or give a number"
            )

    @property
    def wants_calibration(self) -> bool:
        """Whether a predictor of the packed sites is fitted to activations."""
        rules = (decision.site.rule for decision in self.packing)
        return any(rule.predictor.wants_calibration for rule in rules if rule is not None)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.decisions, self.origin)

    def pack(self, weights: Sequence[Any], calibration: Calibration) -> Packed:
        with around_packing(weights):
            return pack(self.trace, self.decisions, self.origin, weights, calibration)

    def pack_shapes(self, weights: Sequence[Any]) -> Packed:
        with around_packing(weights):
            return pack_shapes(self.trace, self.decisions, self.origin, weights)

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

    def replacements(self, packed: Packed | None, mode: str) -> list[SiteReplacement]:
        """What takes the place of the packed sites; without a `Packed` their exact top-k."""
        if packed is None:
            return [raw_replacement(decision) for decision in self.decisions if decision.asked]
        return [
            swap
            for d in self.packing
            for swap in packed_replacements(
                self.trace, d, packed.sites[d.state], mode, self.functions
            )
        ]


class Analyses:
    """The analyses of one function, each made once.

    Args:
      weights: the positions of the arguments that hold weights.
      mesh: where to spread the rows of sites whose weights are not spread.
      on_miss, warn: what to do when a rule fits no site, and how.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        rules: tuple[Rule, ...],
        weights: tuple[int, ...],
        mesh: Mesh | None,
        on_miss: str,
        warn: Callable[[str], None],
    ) -> None:
        self.fn, self.name, self.rules, self.weights = fn, name, rules, weights
        self.mesh, self.on_miss, self._warn = mesh, on_miss, warn
        self._known: dict[Any, Analysis] = {}
        self._detections: dict[Any, tuple[Trace, Detection]] = {}

    def again(self, rules: tuple[Rule, ...]) -> Analyses:
        """Those of the same function with other rules."""
        return Analyses(self.fn, self.name, rules, self.weights, self.mesh, "ignore", self._warn)

    def of(
        self,
        packed: Packed | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        learned: Learnings = (),
    ) -> Analysis:
        """The analysis of a call.

        Args:
          packed: the `Packed` that stands for the weights among `args`, if one does.
          args, kwargs: arrays or shapes.
          learned: what calibration told, if there is no `Packed` to tell it.

        Raises:
          HireRewriteError: the `Packed` was made for something else.
        """
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
        try:
            typed = [
                jax.tree.map(placed if i in self.weights else abstract, arg)
                for i, arg in enumerate(full)
            ]
            leaves, tree = jax.tree.flatten((tuple(typed), jax.tree.map(abstract, dict(kwargs))))
        except TypeError:
            trace(self.fn, full, kwargs, self.weights)  # raises the error that names the leaf
            raise
        learned = learned if packed is None else packed.learned
        specs = tuple(leaves)
        key = (tree, specs, learned)
        if key not in self._known:
            try:
                self._known[key] = self._new(tree, specs, learned)
            except (TypeError, ValueError) as error:
                if packed is None or isinstance(error, HireRewriteError):
                    raise
                raise HireRewriteError(
                    f"{self.name}: the function cannot be traced with weights of the shapes that "
                    f"the Packed was made of ({str(error).splitlines()[0]}): if the other "
                    "arguments are right, pack again from this function's weights"
                ) from error
        analysis = self._known[key]
        if packed is None:
            return analysis
        if packed.fingerprint != analysis.fingerprint:
            raise HireRewriteError(
                f"{self.name}: the Packed was made for the plan {packed.fingerprint}, but this "
                f"call has the plan {analysis.fingerprint}: the rules, the sites, the shapes of "
                "the weights or the machine that they have to pay on differ; pack again with this "
                "function, or give force=True where machines differ"
            )
        packed.check()
        return analysis

    def _new(
        self,
        tree: Any,
        specs: tuple[jax.ShapeDtypeStruct, ...],
        learned: Learnings,
    ) -> Analysis:
        args, kwargs = jax.tree.unflatten(tree, specs)
        if (tree, specs) not in self._detections:
            traced = trace(self.fn, args, kwargs, self.weights)
            detection = detect(traced, min_width(self.rules), self.mesh)
            self._detections[tree, specs] = traced, detection
        traced, detection = self._detections[tree, specs]
        plan, decisions = decide(detection, self.rules, dict(learned))
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
        return Analysis(traced, plan, decisions, origin)

    def joined(self, args: Sequence[Any] | Mapping[int, Any], batch: Sequence[Any]) -> list[Any]:
        """A batch with the weights among `args` in their places."""
        rest = iter(batch)
        count = len(batch) + len(self.weights)
        return [args[i] if i in self.weights else next(rest) for i in range(count)]

    def without_weights(self, args: tuple[Any, ...], packed: Packed | None) -> tuple[Any, ...]:
        """`args` with None for the weights where a `Packed` stands for them."""
        if packed is None:
            return args
        others: list[Any] = list(args)
        for i in self.weights:
            others[i] = None
        return tuple(others)
