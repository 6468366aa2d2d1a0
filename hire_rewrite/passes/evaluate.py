"""Run a function dense, with its exact top-k and rewritten, and compare what comes out.

The three run on the same inputs in one compiled function. Sites report their own `Quality` in the
rewritten one; logits of a head outside all loops are compared between the three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.nodes import Node, Scope, Value
from hire_rewrite.graph.view import evaluate
from hire_rewrite.ops.head.head import HeadSpec
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.passes.trace import Trace
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.layout import to_rows

__all__ = ["ModelSums", "evaluation"]

_MODES = ("dense", "exact", "measure")


class ModelSums(NamedTuple):
    """Sums over the tokens of a head.

    Attributes:
      tokens: f32[], how many.
      agree, agree_exact: f32[], those whose arg max is the dense, or exact, model's.
      kl, kl_exact: f32[], Σ KL(dense ‖ rewritten) and Σ KL(exact ‖ rewritten), in nats.
      targets: f32[], tokens with a known class.
      nll: f32[3], Σ −log p(class) of them: dense, exact, rewritten.
    """

    tokens: Array
    agree: Array
    agree_exact: Array
    kl: Array
    kl_exact: Array
    targets: Array
    nll: Array


def evaluation(
    trace: Trace,
    decisions: Sequence[Decision],
    replacements: Callable[[Any, str], Sequence[Any]],
    *,
    sites_only: bool = False,
) -> Callable[[Any], dict[str, Any]]:
    """A function of (Packed, inputs by number, classes or None) to `sites` and `model` sums.

    Args:
      replacements: of a `Packed` in a mode.
      sites_only: run the exact model alone, with reports of the sites.
    """
    head = None if sites_only else _last_head(decisions)
    alone = "measure exact" if sites_only else "measure"

    packing = [decision for decision in decisions if decision.packs]
    # Then the exact model is the dense one.
    no_topk = all(isinstance(d.spec, HeadSpec) and d.spec.tail == "predicted" for d in packing)
    modes = _MODES if head is not None else (alone,)

    def run(operands: Any) -> dict[str, Any]:
        packed, inputs, classes = operands
        if classes is not None and head is None:
            raise HireRewriteError(
                "evaluate: targets are given, but there is no vocabulary head outside of loops and "
                "shard_maps to compare them with: leave targets out"
            )
        sites: dict[str, Any] = {}
        logits: list[Array] = []
        for mode in modes:
            if mode == "exact" and no_topk:
                logits.append(logits[-1])
                continue
            swaps, watched = list(replacements(packed, mode)), ""
            if head is not None:
                swaps, watched = _watched(swaps, head)
            rewritten = rewrite(trace, swaps)
            _, reports = rewritten({i: inputs[i] for i in rewritten.needs})
            if head is not None:
                own, values = reports.pop(watched)
                logits.append(values)
                if own is not None:
                    reports[watched] = own
            if mode.startswith("measure"):
                sites = reports
        model = None if head is None else _compare(logits, classes, _first_row(head))
        return {"sites": sites, "model": model}

    return run


def _last_head(decisions: Sequence[Decision]) -> HeadMatch | None:
    """The last head that runs once in a call."""
    matches = [d.found.match for d in decisions]
    heads = [m for m in matches if isinstance(m, HeadMatch) and m.linear.node.scope.parent is None]
    return max(heads, key=lambda match: match.linear.node.index) if heads else None


def _first_row(head: HeadMatch) -> int:
    return head.places[head.endpoints[-1]][1]


@dataclasses.dataclass(frozen=True, eq=False)
class _Watched:
    """A replacement, or the last node of a head that stays, which reports the logits too."""

    name: str
    nodes: frozenset[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    run: Callable[[Sequence[Any], Mapping[Scope, Any], Any], tuple[list[Any], Any]]
    logits: Value
    axis: int
    state: Any = None
    shards: None = None
    loops: tuple[Scope, ...] = ()
    reports: bool = True

    def emit(
        self, ins: Sequence[Any], index: Mapping[Scope, Any], state: Any
    ) -> tuple[list[Any], Any]:
        results, report = self.run(ins, index, state)
        rows = to_rows(results[self.outputs.index(self.logits)], (self.axis,))
        return results, (report, rows.astype(jnp.float32))


def _watched(swaps: Sequence[Any], head: HeadMatch) -> tuple[list[Any], str]:
    """The replacements, with one that reports the head's logits, and its name."""
    value = head.endpoints[-1]
    axis = head.places[value][0]
    found, name = [], ""
    for swap in swaps:
        if value in swap.outputs:
            name = swap.name
            swap = _Watched(
                name, swap.nodes, swap.inputs, swap.outputs, swap.emit, value, axis, swap.state
            )
        found.append(swap)
    if not name:
        name, node = "logits", value.node
        assert node is not None

        def run(ins: Sequence[Any], *_: Any) -> tuple[list[Any], Any]:
            return evaluate(node, ins), None

        found.append(_Watched(name, frozenset({node}), node.ins, node.outs, run, value, axis))
    return found, name


def _compare(logits: Sequence[Array], classes: Array | None, first: int) -> ModelSums:
    """Sums of what dense, exact and rewritten logits, [tokens, V] each, differ by."""
    dense, exact, hire = (jax.nn.log_softmax(z, axis=-1) for z in logits)
    best = [z.argmax(-1) for z in logits]
    tokens, width = dense.shape
    nll, count = jnp.zeros(3), jnp.zeros(())
    if classes is not None:
        if classes.shape != (tokens,):
            raise HireRewriteError(
                f"evaluate: targets gives {classes.size} classes for {tokens} rows of logits: give "
                "one for each, negative where there is none"
            )
        place = classes.astype(jnp.int32) - first
        known = (place >= 0) & (place < width)
        place = jnp.clip(place, 0, width - 1)[:, None]
        each = [-jnp.take_along_axis(z, place, axis=-1)[:, 0] for z in (dense, exact, hire)]
        nll = jnp.stack([jnp.where(known, z, 0.0).sum() for z in each])
        count = known.sum().astype(jnp.float32)
    return ModelSums(
        tokens=jnp.float32(tokens),
        agree=(best[2] == best[0]).sum().astype(jnp.float32),
        agree_exact=(best[2] == best[1]).sum().astype(jnp.float32),
        kl=_kl(dense, hire),
        kl_exact=_kl(exact, hire),
        targets=count,
        nll=nll,
    )


def _kl(p: Array, q: Array) -> Array:
    """Σ over tokens of KL(p ‖ q) of log probabilities [tokens, V]."""
    chance = jnp.exp(p)
    return jnp.where(chance > 0, chance * (p - q), 0.0).sum()
