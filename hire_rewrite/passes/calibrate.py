"""Collect statistics of the sites' inputs by running the function's own code with taps.

A tap stands in the place of a site's first product: it computes the product as it was, and
reports the moments of its input. Loops stack the reports of sites that have weights of their own
in each iteration, and sum all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.moments import Moments
from hire_rewrite.passes.detect import Found
from hire_rewrite.passes.rewrite import Rewritten, rewrite
from hire_rewrite.passes.rows import to_rows
from hire_rewrite.passes.trace import Trace, abstract
from hire_rewrite.passes.view import evaluate
from hire_rewrite.passes.weights import site_loops
from hire_rewrite.patterns.graph import Node, Scope, Value
from hire_rewrite.patterns.linear import Linear

__all__ = ["collect", "tap"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Tap:
    """The replacement of a linear layer by itself, with a report."""

    name: str
    linear: Linear
    loops: tuple[Scope, ...]
    reports: bool = True

    @property
    def nodes(self) -> frozenset[Node]:
        return frozenset({self.linear.node})

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.linear.node.ins

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.linear.node.outs

    def emit(self, ins: Sequence[Any], index: Mapping[Scope, Any]) -> tuple[list[Any], Any]:
        x = ins[self.linear.node.ins.index(self.linear.x)]
        return evaluate(self.linear.node, ins), Moments.of(to_rows(x, self.linear.x_axes))


def tap(trace: Trace, sites: Sequence[Found]) -> Rewritten:
    """The traced function with a tap at each of `sites`; its reports are `Moments`.

    Moments have leading axes for the scans over which the site's weights vary.
    """
    taps = [_Tap(s.name, s.match.linears[0], site_loops(trace, s.match)) for s in sites]
    return rewrite(trace, taps)


def _merged(moments: Moments, layers: int) -> Moments:
    """Moments with their leading axes merged to one of `layers`."""

    def merge(leaf: jax.Array, rank: int) -> jax.Array:
        return jnp.reshape(leaf, (layers, *leaf.shape[leaf.ndim - rank :]))

    return Moments(merge(moments.count, 0), merge(moments.total, 1), merge(moments.second, 2))


def collect(
    batches: Iterable[tuple[Any, ...]],
    example: Sequence[Any],
    sites: Mapping[str, tuple[str, int]],
    call: Callable[[tuple[Any, ...]], tuple[Trace, Sequence[Found], Sequence[Any]]],
) -> dict[str, Moments]:
    """Moments of the sites' inputs over all batches, with one leading axis of layers, by state.

    Args:
      batches: tuples of the arguments after the weights.
      example: those arguments in the call that is packed for.
      sites: for each site the state that it uses (sites may share one), and its layers.
      call: the trace, the sites and the input arrays of a call with a batch.

    Raises:
      HireRewriteError: a batch has another structure than `example`, there is none, or a site's
        inputs hold a NaN or an infinity.
    """
    taps: dict[Trace, tuple[Rewritten, Any]] = {}
    totals: dict[str, Moments] = {}
    for number, batch in enumerate(batches):
        _check(number, batch, example)
        traced, found, inputs = call(batch)
        if traced not in taps:
            tapped = tap(traced, [site for site in found if site.name in sites])
            taps[traced] = (tapped, jax.jit(lambda arrays, tapped=tapped: tapped(arrays)[1]))
        tapped, run = taps[traced]
        reports = run({i: inputs[i] for i in tapped.needs})
        for name, report in reports.items():
            state, layers = sites[name]
            moments = _merged(report, layers)
            totals[state] = totals[state] + moments if state in totals else moments
    for name in {state for state, _ in sites.values()}:
        if name not in totals or not bool(totals[name].count.all()):
            raise HireRewriteError(
                f"{name}: no calibration batch reached it: give batches of calls that run it"
            )
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(totals[name])):
            raise HireRewriteError(
                f"{name}: its input holds a NaN or an infinity in the calibration batches: look "
                "at the weights and the batches"
            )
    return totals


def _check(number: int, batch: Any, example: Sequence[Any]) -> None:
    if not isinstance(batch, tuple):
        raise HireRewriteError(
            f"calibration batch {number} is a {type(batch).__name__}: give tuples of the arguments "
            "after the weights"
        )
    got: Any = jax.tree.structure(batch)
    want: Any = jax.tree.structure(tuple(example))
    if got != want:
        raise HireRewriteError(
            f"calibration batch {number} has the structure {got}, but the call has {want} after "
            "the weights: give batches structured as in a call"
        )
    for a, b in zip(
        map(abstract, jax.tree.leaves(batch)), map(abstract, jax.tree.leaves(example)), strict=True
    ):
        if a.dtype != b.dtype or len(a.shape) != len(b.shape):
            raise HireRewriteError(
                f"calibration batch {number} holds {a.dtype}{list(a.shape)} where the call has "
                f"{b.dtype}{list(b.shape)}: only leading sizes may differ"
            )
