"""A call: what is packed or raw goes through the rewritten graph, or the function runs as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite import _compat
from hire_rewrite.analyses import Analyses
from hire_rewrite.analysis import Analysis
from hire_rewrite.errors import Warner
from hire_rewrite.gradient import LOST_RULE, OTHER_GRADIENT, announcing
from hire_rewrite.graph.calls.derivative import all_describe_code
from hire_rewrite.log import timed
from hire_rewrite.names import first_names
from hire_rewrite.packed import Packed, check_widths
from hire_rewrite.passes.count import counting, telemetry
from hire_rewrite.passes.modes import Mode
from hire_rewrite.passes.rewrite import rewrite_for
from hire_rewrite.telemetry import collected


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Runner:
    """Calls of a transformed function, traced or not.

    Attributes:
      telemetry: as `transform` is given it.
    """

    fn: Callable[..., Any]
    name: str
    analyses: Analyses
    mode: Mode
    telemetry: bool | float
    warn: Warner

    def run(
        self,
        packed: Packed | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        analysis: Analysis | None = None,
        *,
        marked: bool = True,
        counted: bool = True,
    ) -> Any:
        """The function on a `Packed` (`args` have None for the weights) or on raw weights.

        Args:
          marked: whether to say so where it is differentiated and should not be.
          counted: whether to return its telemetry, if it has some.
        """
        counted = counted and self.telemetry is not False
        nothing = collected((), {}) if counted else None

        def original() -> Any:
            result = self.fn(*args, **kwargs)
            return (result, nothing) if counted else result

        if packed is None and not (self.mode.packs_on_sight or self.mode.exact_form):
            return original()
        packed = _alike(packed)
        analysis = analysis or self.analyses.of(packed, args, kwargs)
        if packed is None:
            analysis.check_decided()
            if not (self.mode.exact_form and analysis.exact_forms):
                return original()  # nothing is packed, or nothing is asked for
            swaps = analysis.exact_forms
        else:
            check_widths(self.name, packed)
            share = 0.0 if self.telemetry is True else float(self.telemetry)
            packing = counting(self.mode, share) if counted else self.mode.packed
            swaps = analysis.replacements(packed, packing)
        inputs = analysis.inputs(packed, args, kwargs)
        rewritten = rewrite_for(analysis.trace, swaps, inputs, self.name)
        with timed(self.name, "rewrite") as found:
            results, reports = rewritten(inputs)
            found("%d replacement(s)", len(set(rewritten.units.values())))
        if marked:
            results = self._mark(results, inputs.values(), analysis, packed)
        result = jax.tree.unflatten(analysis.trace.out_tree, results)
        if not counted:
            return result
        return result, nothing if packed is None else telemetry(analysis.packing, reports)

    def _mark(
        self,
        results: Sequence[Any],
        given: Iterable[Any],
        analysis: Analysis,
        packed: Packed | None,
    ) -> Any:
        """Results that warn, once of each site, where a gradient is taken that is another one."""
        other = [] if self.mode.differentiable else analysis.other_gradients
        lost = {n: calls for n, calls in analysis.lost_rules(packed).items() if n not in other}
        # And neither `self` nor the analysis: programs hold what is called, which would hold them.
        warn = self.warn

        def announce() -> None:
            # Which rules are those of their code is tried where it matters: here.
            differ = [n for n, calls in lost.items() if not (calls and all_describe_code(calls))]
            for sites, text in ((other, OTHER_GRADIENT), (differ, LOST_RULE)):
                if new := warn.new(("gradient", name) for name in sites):
                    warn(text.format(first_names([name for _, name in new])))

        return announcing(announce)(results, given) if other or lost else results


def _alike(packed: Packed | None) -> Packed | None:
    """Inside a `shard_map`, a `Packed` whose arrays all differ from device to device if one does:
    so the function is traced."""
    if not _compat.manual_axes():
        return packed
    arrays, tree = jax.tree.flatten(packed)
    alike: Packed | None = jax.tree.unflatten(tree, _compat.varying_alike(arrays))
    return alike
