"""Checks of a rewrite, for a test suite of your own.

    from hire_rewrite import testing

    def test_my_model():
        testing.assert_rewrites(step, params, token, cache, ffn=1, head=1)
        testing.assert_same_at_full_budget(decode_step, params, token, cache)
        testing.assert_no_change_of_meaning(step, params, [(token, cache)])

Models of tests are small: give rules `force=True`, or set HIRE_REWRITE_MACHINE=bytes in the
environment, or what does not pay in time stays dense. `examples/test_my_model.py` is a file to
copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.api import transform
from hire_rewrite.arguments import with_packed, without_weights
from hire_rewrite.ops.encodings import Float
from hire_rewrite.ops.predictors import Quantized
from hire_rewrite.packed import Packed
from hire_rewrite.report import Report
from hire_rewrite.rules import Rule
from hire_rewrite.sites import site_kinds
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.head.rule import Head
from hire_rewrite.sites.linear.rule import Linear
from hire_rewrite.transformed import Transformed

__all__ = [
    "FULL_BUDGET",
    "assert_no_change_of_meaning",
    "assert_recall",
    "assert_rewrites",
    "assert_same_at_full_budget",
]

FULL_BUDGET: tuple[Rule, ...] = (
    FFN(k=1.0, candidates=1.0, predictor=Quantized(), max_tokens=None, force=True),
    Head(k=1.0, candidates=1.0, predictor=Quantized(), force=True),
    Linear(encoding=Float("float32"), force=True),
)
"""Rules by which all that can be rewritten is, and nothing is left out or rounded."""


def assert_rewrites(step: Transformed, *args: Any, **counts: int) -> None:
    """A transformed function rewrites so many sites of each kind; kinds that are not named, none.

    Args:
      args: a call's arguments: a `Packed` or the weights, and arrays or shapes.
      counts: by the names of the kinds: `ffn=1, head=1, linear=2`. A site in a scanned layer
        counts once.

    Raises:
      AssertionError: with the plan, which says why.

    Examples:
      >>> import hire_rewrite as hire
      >>> step = hire.transform(lambda w, x: x @ w, hire.Head(force=True))
      >>> assert_rewrites(step, jnp.ones((64, 8192)), jnp.ones((1, 64)), head=1)
    """
    known = [kind.name for kind in site_kinds()]
    for name in counts:
        if name not in known:
            raise AssertionError(f"{name} is not a kind of site: there are {', '.join(known)}")
    plan = step.plan(*args)
    found = dict.fromkeys(known, 0)
    for site in plan.sites:
        found[site.kind] += site.status == "rewritten"
    wanted = {name: counts.get(name, 0) for name in known}
    if found != wanted:
        raise AssertionError(
            f"{_counted(found)} are rewritten, instead of {_counted(wanted)}:\n{plan}"
        )


def assert_same_at_full_budget(
    fn: Callable[..., Any],
    *args: Any,
    rules: Sequence[Rule] = FULL_BUDGET,
    weights: int | Sequence[int] = 0,
    tolerance: float = 1e-4,
) -> None:
    """A function computes the same when all of it is rewritten and nothing is left out.

    What goes wrong here is a site that was taken for what it is not.

    Args:
      args: a call's arguments, arrays.
      rules, weights: as in `transform`.
      tolerance: how far results may be apart, as a share of the greatest of an array; more for
        bfloat16.

    Raises:
      AssertionError: a result is another one, or nothing was rewritten.

    Examples:
      >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 64)), jnp.ones((1, 64))
      >>> assert_same_at_full_budget(lambda w, x: jax.nn.relu(x @ w[0]) @ w[1], w, x)
    """
    positions = tuple(weights) if isinstance(weights, list | tuple) else (weights,)
    step = transform(fn, *rules, weights=positions)
    plan = step.plan(*args)
    if not any(site.status == "rewritten" for site in plan.sites):
        raise AssertionError(f"nothing is rewritten:\n{plan}")
    packed = step.pack(*args, calibration=[without_weights(args, positions)])
    held = with_packed(args, positions, packed)
    _assert_close(jax.jit(step)(*held), jax.jit(fn)(*args), tolerance, str(plan))


def assert_recall(
    step: Transformed,
    packed: Packed,
    batches: Iterable[tuple[Any, ...]],
    at_least: float = 0.99,
    **settings: Any,
) -> Report:
    """Each layer of each site finds so much of its true top k, on average over tokens.

    Args:
      packed, batches, settings: as in `Transformed.evaluate`: each token is measured as if it were
        decoded alone. With `weights=` where `packed` holds rounded copies alone.

    Returns:
      The report.

    Raises:
      AssertionError: with the report.

    Examples:
      >>> import hire_rewrite as hire
      >>> w, x = jax.random.normal(jax.random.key(0), (64, 8192)), jnp.ones((1, 64))
      >>> step = hire.transform(lambda w, x: x @ w, hire.Head(force=True))
      >>> report = assert_recall(step, step.pack(w, x), [(x,)])
      >>> report.sites[0].recall
      (1.0,)
    """
    report = step.evaluate(packed, batches, **settings)
    missed = [site.name for site in report.sites if min(site.recall) < at_least]
    if missed:
        raise AssertionError(f"recall below {at_least} at {', '.join(missed)}:\n{report}")
    return report


def assert_no_change_of_meaning(
    step: Transformed,
    params: Any,
    batches: Sequence[tuple[Any, ...]],
    *,
    same_token: float = 1.0,
    kl: float = 1e-4,
    calibration: Iterable[tuple[Any, ...]] | None = None,
) -> Report:
    """The rewritten model says what the dense one says: the same tokens, with the same probability.

    As it decodes: each token is measured as if it were decoded alone (see `Transformed.evaluate`).

    Args:
      params: the argument that holds weights, a tuple of them if there are several.
      batches: tuples of the arguments after the weights.
      same_token: the least share of tokens with the dense model's arg max.
      kl: the most that the rewritten model may diverge, in nats a token, on average.
      calibration: as in `Transformed.pack`.

    Returns:
      The report.

    Raises:
      AssertionError: with the report; or the model has no vocabulary head outside of loops.

    Examples:
      >>> import hire_rewrite as hire
      >>> w, x = jax.random.normal(jax.random.key(0), (64, 8192)), jnp.ones((1, 64))
      >>> step = hire.transform(lambda w, x: x @ w)
      >>> assert_no_change_of_meaning(step, w, [(x,)]).model.agreement
      1.0
    """
    batches = list(batches)
    held = params if len(step.weights) > 1 else (params,)
    call: list[Any] = list(batches[0])
    for position, argument in zip(step.weights, held, strict=True):
        call.insert(position, argument)
    packed = step.pack(*call, calibration=calibration)
    report = step.evaluate(packed, batches, weights=params)
    if report.model is None:
        raise AssertionError("the model has no vocabulary head outside of loops to compare")
    if report.model.agreement < same_token or not report.model.kl <= kl:
        raise AssertionError(
            f"less than {same_token:.2%} of tokens the same, or a KL above {kl}:\n{report}"
        )
    return report


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _assert_close(got: Any, want: Any, tolerance: float, plan: str) -> None:
    structures: list[Any] = [jax.tree.structure(got), jax.tree.structure(want)]
    if structures[0] != structures[1]:
        raise AssertionError(f"the results are structured otherwise\n{plan}")
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        where = f"result{jax.tree_util.keystr(path)}"
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise AssertionError(f"{where} is {a.dtype}{a.shape}, not {b.dtype}{b.shape}\n{plan}")
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            same, apart = bool((a == b).all()), 0.0
        else:
            x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
            limit = tolerance * max(1.0, np.abs(y[np.isfinite(y)]).max(initial=0.0))
            with np.errstate(invalid="ignore"):
                apart = float(np.abs(x - y)[np.isfinite(y)].max(initial=0.0))
            same = np.allclose(x, y, rtol=0, atol=limit, equal_nan=True)
        if not same:
            raise AssertionError(f"{where} differs, by {apart:.3g} at most\n{plan}")
