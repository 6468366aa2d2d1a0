"""What is known of a function at some shapes: its trace, its plan, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.fingerprint import fingerprint
from hire_rewrite.graph.calls.derivative import derivative_calls
from hire_rewrite.graph.trace import Trace
from hire_rewrite.origin import Origin
from hire_rewrite.packed import Packed, check_not_deleted
from hire_rewrite.passes.decide import OtherLayout, decide
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.detect import Detection
from hire_rewrite.passes.examine import examine, weight_stacker
from hire_rewrite.passes.modes import HIRE, Packing
from hire_rewrite.passes.pack import Calibration, pack, pack_shapes
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.plan import Plan
from hire_rewrite.sharding.rows import packing_context
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """The trace of a function, and the plan for it."""

    trace: Trace
    detection: Detection
    plan: Plan
    decisions: tuple[Decision, ...]
    origin: Origin
    statistics: Mapping[str, Any]

    @property
    def packing(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.packs]

    @property
    def other_gradients(self) -> list[str]:
        """The sites of this call whose derivative, rewritten, is not the model's."""
        return [
            d.name
            for d in self.decisions
            if d.rewritten and not (d.op.keeps_gradient and _without_rule(d))
        ]

    def lost_rules(self, packed: Packed | None) -> dict[str, list[Any]]:
        """The sites that are in calls with a derivative of their own, or hold some, and in whose
        place something is put: whatever is packed, or on raw weights the exact forms.

        Returns:
          By name the calls that it holds, whose rules may yet be those of their code; none where it
          is in one.
        """
        replaced = self._exact_forms if packed is None else self.packing
        return {
            d.name: calls if _without_rule(d) else []
            for d in replaced
            if (calls := _derivative_calls(d))
        }

    @property
    def exact_forms(self) -> list[SiteReplacement]:
        """What takes the place of sites on raw weights in mode "exact"."""
        return [*self._exact_forms.values()]

    @functools.cached_property
    def _exact_forms(self) -> dict[Decision, SiteReplacement]:
        asked = (d for d in self.decisions if d.asked and not d.undecided)
        return {d: form for d in asked if (form := d.op.exact_form()) is not None}

    @property
    def undecided(self) -> list[Decision]:
        """Sites whose sizes calibration has to find."""
        return [decision for decision in self.decisions if decision.undecided]

    def check_decided(self) -> None:
        """Raise HireRewriteError if a site's sizes are yet to be found."""
        for decision in self.undecided:
            raise HireRewriteError(
                f"{decision.name}: {decision.op.undecided}; call with the Packed, or give a number"
            )

    @property
    def wants_calibration(self) -> bool:
        """Whether a predictor of the packed sites is fitted to activations."""
        return any(decision.op.fits for decision in self.packing)

    @property
    def unexamined(self) -> list[Decision]:
        """Sites that packing has to look at first."""
        return [d for d in self.decisions if d.operation is not None and d.operation.examines]

    def examined(self, weights: Sequence[Any]) -> dict[str, Any]:
        """What the numbers of weights tell about `unexamined` sites, by label; nothing in a trace
        and of shapes."""
        if any(isinstance(w, jax.ShapeDtypeStruct | jax.core.Tracer) for w in weights):
            return {}
        with packing_context(weights), jax.transfer_guard("allow"):
            return examine(self.trace, self.unexamined, weights)

    def pack(
        self,
        weights: Sequence[Any],
        calibration: Calibration | None = None,
        known: Sequence[Packed] = (),
    ) -> Packed:
        """The weights, arrays or shapes, in packed form.

        Args:
          known: made of the same weights for other calls: sites that they hold are not packed anew.
        """
        shapes = any(isinstance(weight, jax.ShapeDtypeStruct) for weight in weights)
        sites = calibration.sites if calibration is not None else {}
        calibration, origin = Calibration(sites, self.statistics), self.origin
        # A guard against transfers is for what a program does at each call.
        with packing_context(weights), jax.transfer_guard("allow"):
            if not shapes and not any(isinstance(w, jax.core.Tracer) for w in weights):
                check_not_deleted("pack", origin.paths, weights)
                origin = dataclasses.replace(origin, fingerprint=fingerprint(weights))
            what = self.trace, self.decisions, origin, weights, calibration
            packed = pack_shapes(*what) if shapes else pack(*what, known)
            if origin.fingerprint is None:
                return packed
            origin = dataclasses.replace(origin, packed=fingerprint(jax.tree.leaves(packed)))
        return dataclasses.replace(packed, info=dataclasses.replace(packed.info, origin=origin))

    def with_weights(self, packed: Packed, weights: Sequence[Any] | None) -> Packed:
        """A `Packed` with the weights of sites that hold rounded ones alone, to compare with.

        Args:
          weights: the weight inputs, in order; None if nobody has them.

        Raises:
          HireRewriteError: nobody has them, and a site needs them.
        """
        lacking = [d for d in self.packing if not d.op.holds_weights]
        if not lacking:
            return packed
        if weights is None:
            raise HireRewriteError(
                f"evaluate: {lacking[0].name} is packed in fewer bits than the model's, so that "
                "the Packed does not hold what it is to be compared with: give weights=, the "
                "weights that it was packed from"
            )
        stacker = weight_stacker(self.trace, weights)
        sites = dict(packed.sites)
        for d in lacking:
            rows = WeightRows(stacker, d.site.loops)
            sites[d.packed_name] = d.op.with_weights(packed.sites[d.packed_name], rows)
        return dataclasses.replace(packed, sites=sites)

    def served_by(self, packed: Packed) -> bool:
        """Whether a `Packed` that was made of the weights of this call, for a call of another kind,
        is as good as one made for this one: it has all sites that this one packs, as its rules ask
        for them, knows all whose numbers this one looks at, and has the weights beside them."""
        info, packs = packed.info, self.packing
        if info.origin.tree != self.origin.tree or not all(
            info.sites_of(d.site.kind.name, d.site.key)
            or (d not in packs and info.examined_site(d.site.kind.name, d.site.key))
            for d in (*packs, *self.unexamined)
        ):
            return False
        try:
            _, decisions = decide(self.detection, self.detection.rules, {}, info)
        except OtherLayout:
            return False
        call = dataclasses.replace(self, decisions=decisions)
        needs = rewrite(self.trace, call.replacements(packed, HIRE.packed)).needs
        paths = zip(self.trace.weights, info.origin.paths, strict=True)
        return all(path in packed.weights for i, path in paths if i in needs)

    def inputs(
        self, packed: Packed | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[int, Any]:
        """The arrays of the traced function's inputs, by number; weights as far as there are."""
        rest = jax.tree.leaves((tuple(args), kwargs))
        if packed is None:
            return dict(enumerate(rest))
        numbers = [i for i in range(len(self.trace.paths)) if i not in self.trace.weights]
        inputs = dict(zip(numbers, rest, strict=True))
        # The function that it was packed for may have called the argument otherwise.
        paths = dict(zip(self.trace.weights, packed.info.origin.paths, strict=True))
        kept = {i: packed.weights[path] for i, path in paths.items() if path in packed.weights}
        return inputs | kept

    def replacements(self, packed: Packed, packing: Packing) -> list[SiteReplacement]:
        """What takes the place of the packed sites."""
        return [
            replacement
            for decision in self.packing
            for replacement in packing(decision, packed.sites[decision.packed_name])
        ]


def _without_rule(decision: Decision) -> bool:
    """Not inside a call that has its derivative from a rule: what is put into it dissolves it."""
    return not any(derivative_calls(linear.node) for linear in decision.site.linears)


def _derivative_calls(decision: Decision) -> list[Any]:
    """The calls with a derivative of their own that a site is in, or that it holds."""
    calls = (eqn for node in decision.nodes for eqn in derivative_calls(node))
    return list({id(eqn): eqn for eqn in calls}.values())
