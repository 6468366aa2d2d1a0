"""Run a function dense, with its exact top-k and rewritten, and compare what comes out.

The three run on the same inputs in one compiled function, each token as if it were decoded alone.
Sites report their own `Quality` in the rewritten one; logits of a head outside all loops are
compared between the three.

Where the dense model's own numbers are NaN nothing can be compared, and the batch is refused; where
the rewritten one's alone are, the token counts as another one, and its divergence is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hire_rewrite.analyses import Analyses
from hire_rewrite.analysis import Analysis
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.packed import Packed
from hire_rewrite.passes.accumulate import accumulate
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.logits import (
    check_defined,
    divergence,
    last_logits,
    undefined,
    with_logits,
)
from hire_rewrite.passes.modes import DENSE, EXACT, Packing
from hire_rewrite.passes.rewrite import rewrite_for
from hire_rewrite.passes.summarize import summarize
from hire_rewrite.report import Report
from hire_rewrite.sites import Logits
from hire_rewrite.sites.replacement import SiteReplacement


class ModelSums(NamedTuple):
    """Sums over the tokens of a head.

    Attributes:
      tokens: f32[], how many.
      undefined: f32[], those whose dense logits give no probabilities.
      agree, agree_exact: f32[], those whose arg max is the dense, or exact, model's; none that is
        NaN.
      kl, kl_exact: f32[], Σ KL(dense ‖ rewritten) and Σ KL(exact ‖ rewritten), in nats.
      targets: f32[], tokens with a known class.
      nll: f32[3], Σ −log p(class) of them: dense, exact, rewritten.
    """

    tokens: Array
    undefined: Array
    agree: Array
    agree_exact: Array
    kl: Array
    kl_exact: Array
    targets: Array
    nll: Array


def evaluate(
    analyses: Analyses,
    packed: Packed,
    batches: Iterable[tuple[Any, ...]],
    weights: Any,
    targets: Callable[..., Any] | None,
    kwargs: Mapping[str, Any],
    *,
    sites_only: bool = False,
) -> Report:
    """Run batches and report what sites miss; the arguments are those of `Transformed.evaluate`.

    Args:
      sites_only: leave out the model, and have all sites see what the exact model computes.

    Raises:
      HireRewriteError: targets do not fit, there is no batch, or for a token of one the dense
        model's logits are not numbers (or a site's result, where logits are not compared).
    """
    if targets is not None and not callable(targets):
        raise HireRewriteError(
            f"{analyses.name}: evaluate: targets is a {type(targets).__name__}: give a function of "
            "a batch's arguments that returns the classes, such as "
            "targets=lambda tokens, classes: classes"
        )
    given = dict.fromkeys(analyses.weights[1:]) | dict.fromkeys(analyses.weights[:1], packed)
    kinds: list[Analysis] = []
    whole = packed

    def prepare(batch: tuple[Any, ...]) -> tuple[Analysis, Any]:
        nonlocal whole
        args = analyses.joined(given, batch)
        analysis = analyses.of(packed, args, kwargs)
        if not kinds:
            whole = analysis.with_weights(packed, weights)
        kinds.append(analysis)
        known = analysis.inputs(packed, analyses.without_weights(tuple(args), packed), kwargs)
        wanted = None
        if targets is not None:
            wanted = _classes(targets(*batch), _place(analysis))
        return analysis, (whole, known, wanted)

    build = functools.partial(_sums, sites_only=sites_only, name=analyses.name)
    total = accumulate("evaluation batch", batches, None, prepare, build, _check_defined)
    if total is None:
        raise HireRewriteError(
            f"{analyses.name}: no batches to evaluate on: give at least one (a "
            "generator that has run once has none left)"
        )
    return summarize([kind.packing for kind in kinds], total)


def _sums(analysis: Analysis, *, sites_only: bool, name: str) -> Callable[[Any], dict[str, Any]]:
    """(Packed, inputs by number, classes or None) to the sums of the sites and of the model."""

    def measured(decision: Decision, arrays: Any) -> list[SiteReplacement]:
        swaps = decision.op.measured(arrays, follow_exact=sites_only)
        if not any(swap.reports for swap in swaps):
            raise HireRewriteError(
                f"{decision.name}: `measured` of {decision.site.kind.name} sites reports no Quality"
            )
        return swaps

    head = None if sites_only else last_logits(analysis.decisions)
    modes: list[Packing] = [measured]
    if head is not None:
        exact_is_dense = all(decision.op.exact_is_dense for decision in analysis.packing)
        others = [DENSE.packed, EXACT.packed]
        modes = [*(others[:1] if exact_is_dense else others), *modes]

    def run(operands: Any) -> dict[str, Any]:
        packed, inputs, classes = operands
        reports: dict[str, Any] = {}
        logits: list[Array] = []
        for mode in modes:
            swaps, site = analysis.replacements(packed, mode), ""
            if head is not None:
                swaps, site = with_logits(swaps, head)
            reports = rewrite_for(analysis.trace, swaps, inputs, name)(inputs)[1]
            if head is not None:
                quality, values = reports.pop(site)
                logits.append(values)
                if quality is not None:
                    reports[site] = quality
        sums: dict[str, Any] = {"sites": reports}
        if head is not None:
            sums["model"] = _compare(logits[0], logits[-2], logits[-1], classes, head.start)
        return sums

    return run


def _place(analysis: Analysis) -> Logits:
    """The logits that classes are compared with."""
    head = last_logits(analysis.decisions)
    if head is None:
        raise HireRewriteError(
            "evaluate: targets are given, but there is no vocabulary head outside of loops and "
            "shard_maps to compare them with: leave targets out"
        )
    return head


def _classes(given: Any, head: Logits) -> Array:
    """i32[rows], what a user's `targets` returns, negative where there is none.

    Raises:
      HireRewriteError: they are not integers, or one is not in the vocabulary. (Logits may be a
        part of it: the classes of the other rows are known to nobody.)
    """
    remedy = "give integers, one for each row of logits, negative where there is none"
    try:
        # Not by JAX, which takes 2**32 + 1 for 1.
        classes = given if isinstance(given, jax.Array) else np.asarray(given)
    except ValueError as error:
        raise HireRewriteError(f"evaluate: targets returned no array ({error}): {remedy}") from None
    if not jnp.issubdtype(classes.dtype, jnp.integer):
        what = type(given).__name__ if classes.dtype == object else str(classes.dtype)
        raise HireRewriteError(f"evaluate: targets returned {what}, not integers: {remedy}")
    greatest = int(classes.max()) if classes.size else -1
    if greatest >= head.vocabulary:
        raise HireRewriteError(
            f"evaluate: targets returned the class {greatest}, but the vocabulary has "
            f"{head.vocabulary} rows, counted from 0: {remedy}"
        )
    if jnp.issubdtype(classes.dtype, jnp.signedinteger):
        classes = classes.clip(-1)
    return jnp.asarray(classes).astype(jnp.int32).reshape(-1)


def _check_defined(where: str, sums: Mapping[str, Any]) -> None:
    """Raise HireRewriteError if a batch has a token with which nothing can be compared.

    Sites see what the rewritten model computes: where there are logits, these are what counts.
    """
    if "model" in sums:
        model = sums["model"]
        check_defined(where, int(model.undefined), int(model.tokens))
        return
    for name, quality in sums["sites"].items():
        if float(quality.undefined.sum()) > 0:
            raise HireRewriteError(
                f"{where}: {name}: its dense result holds a NaN for some token, so that nothing "
                "can be compared with it: look at the weights and the batch, and leave such "
                "tokens out of it"
            )


def _compare(
    dense: Array, exact: Array, rewritten: Array, classes: Array | None, start: int
) -> ModelSums:
    """Sums of what dense, exact and rewritten logits, [tokens, V] each, differ by."""
    best = [values.argmax(-1) for values in (dense, exact, rewritten)]
    dense, exact, rewritten = (jax.nn.log_softmax(z, axis=-1) for z in (dense, exact, rewritten))
    # The arg max of NaNs is that of others by chance.
    known = ~undefined(rewritten)
    known_exact = known & ~undefined(exact)
    tokens, width = dense.shape
    nll, count = jnp.zeros(3), jnp.zeros(())
    if classes is not None:
        if classes.shape != (tokens,):
            raise HireRewriteError(
                f"evaluate: targets gives {classes.size} classes for {tokens} rows of logits: give "
                "one for each, negative where there is none"
            )
        place = jnp.where(classes < 0, -1, classes - start)
        wanted = (place >= 0) & (place < width)
        place = jnp.clip(place, 0, width - 1)[:, None]
        losses = [
            -jnp.take_along_axis(values, place, axis=-1)[:, 0]
            for values in (dense, exact, rewritten)
        ]
        nll = jnp.stack([jnp.where(wanted, loss, 0.0).sum() for loss in losses])
        count = wanted.sum().astype(jnp.float32)
    return ModelSums(
        tokens=jnp.float32(tokens),
        undefined=undefined(dense).sum().astype(jnp.float32),
        agree=(known & (best[2] == best[0])).sum().astype(jnp.float32),
        agree_exact=(known_exact & (best[2] == best[1])).sum().astype(jnp.float32),
        kl=divergence(dense, rewritten),
        kl_exact=divergence(exact, rewritten),
        targets=count,
        nll=nll,
    )
