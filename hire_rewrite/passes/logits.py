"""The logits of a function, which a rewritten one is compared by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.evaluate import evaluate_inside
from hire_rewrite.passes.decision import Decision
from hire_rewrite.patterns.region import to_tokens
from hire_rewrite.sites import Logits
from hire_rewrite.sites.replacement import SiteReplacement


def last_logits(decisions: Iterable[Decision]) -> Logits | None:
    """The last logits that are computed once in a call."""
    sites = (decision.site for decision in decisions)
    logits = (site.kind.logits(site.match) for site in sites if site.scope.parent is None)
    places = [place for place in logits if place is not None]
    return max(places, key=_index, default=None)


def _index(logits: Logits) -> int:
    assert logits.value.node is not None
    return logits.value.node.index


def with_logits(
    swaps: Sequence[SiteReplacement], logits: Logits
) -> tuple[list[SiteReplacement], str]:
    """The replacements, with one that reports the logits besides, and its name."""
    node = logits.value.node
    assert node is not None

    def itself(ins: Sequence[Any], *_: Any) -> tuple[list[Any], None]:
        return evaluate_inside(node, ins), None

    alone = SiteReplacement("logits", frozenset({node}), node.ins, node.outs, itself)
    swap = next((swap for swap in swaps if logits.value in swap.outputs), alone)

    def run(*operands: Any) -> tuple[Sequence[Any], Any]:
        results, report = swap.run(*operands)
        values = results[swap.outputs.index(logits.value)]
        return results, (report, to_tokens(values, (logits.axis,)).astype(jnp.float32))

    others = [other for other in swaps if other is not swap]
    return [*others, dataclasses.replace(swap, run=run, reports=True)], swap.name


def divergence(p: Array, q: Array) -> Array:
    """Σ over tokens of KL(p ‖ q) of log probabilities [tokens, V]; NaN if one of either is."""
    chance = jnp.exp(p)
    return jnp.where(chance == 0, 0.0, chance * (p - q)).sum()


def undefined(log_chances: Array) -> Array:
    """bool[tokens], those whose log probabilities [tokens, V] are NaN: where a logit is NaN or
    infinity, or all are −infinity (some may be: masked tokens have no probability)."""
    return jnp.isnan(log_chances).any(-1)


def check_defined(where: str, tokens: int, of: int) -> None:
    """Raise HireRewriteError if the dense logits of some tokens are not numbers.

    Args:
      where: the batch, for the message.
      tokens, of: how many are not, of how many.
    """
    if tokens:
        raise HireRewriteError(
            f"{where}: the dense model's logits hold a NaN, infinity, or nothing but −infinity for "
            f"{tokens} of {of} token(s), so that nothing can be compared with them: look at the "
            "weights and the batch, and leave such tokens out of it"
        )
