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

import math
import sys
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
from hire_rewrite.passes.modes import HIRE, MODES
from hire_rewrite.report import Report
from hire_rewrite.rules import Rule
from hire_rewrite.settings import is_int
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
      step: with `mode="exact"` or `"dense"` it rewrites none.
      args: a call's arguments: a `Packed` or the weights, and arrays or shapes.
      counts: by the names of the kinds: `ffn=1, head=1, linear=2`. A site in a scanned layer
        counts once. Without any, nothing is to be rewritten.

    Raises:
      AssertionError: with the plan, which says why; or an argument is not what it has to be.

    Examples:
      >>> import hire_rewrite as hire
      >>> step = hire.transform(lambda w, x: x @ w, hire.Head(force=True))
      >>> assert_rewrites(step, jnp.ones((64, 8192)), jnp.ones((1, 64)), head=1)
    """
    _check_step(step)
    known = [kind.name for kind in site_kinds()]
    for name, count in counts.items():
        if name not in known:
            raise AssertionError(f"{name} is not a kind of site: there are {', '.join(known)}")
        if not is_int(count) or count < 0:
            raise AssertionError(f"{name}={count!r} is not a number of sites: give 0, 1, 2, ...")
    plan, mode = step.plan(*args), _other_mode(step)
    found = dict.fromkeys(known, 0)
    for site in plan.sites:
        found[site.kind] += site.status == "rewritten" and mode is None
    wanted = {name: int(counts.get(name, 0)) for name in known}
    if found != wanted:
        why = "" if mode is None else f' with mode="{mode}"'
        raise AssertionError(
            f"{_counted(found)} are rewritten{why}, instead of {_counted(wanted)}:\n{plan}"
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
      args: a call's arguments, arrays. Predictors that are fitted are fitted to these: `LowRank`
        guesses a single token without error.
      rules, weights: as in `transform`.
      tolerance: how far results may be apart, as a share of the greatest finite number of each
        array; more for bfloat16, and where that is small beside what it is computed of.

    Raises:
      AssertionError: a result is another one, none of its numbers is finite, nothing was
        rewritten, or an argument is not what it has to be.

    Examples:
      >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 64)), jnp.ones((1, 64))
      >>> assert_same_at_full_budget(lambda w, x: jax.nn.relu(x @ w[0]) @ w[1], w, x)
    """
    if isinstance(rules, Rule) or not isinstance(rules, Iterable):
        raise AssertionError(f"rules={rules!r} is not a list: give one of rules, such as [Head()]")
    _check_number("tolerance", tolerance)
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

    There has to be such a site: a head, or an FFN of which a rule asks for a top-k. Products that
    are stored otherwise and computed as a whole predict nothing.

    Args:
      packed, batches, settings: as in `Transformed.evaluate`: each token is measured as if it were
        decoded alone. With `weights=` where `packed` holds rounded copies alone.

    Returns:
      The report.

    Raises:
      AssertionError: with the report; nothing that is packed predicts, and has a recall; or an
        argument is not what it has to be.
      HireRewriteError: as `Transformed.evaluate` does.

    Examples:
      >>> import hire_rewrite as hire
      >>> w, x = jax.random.normal(jax.random.key(0), (64, 8192)), jnp.ones((1, 64))
      >>> step = hire.transform(lambda w, x: x @ w, hire.Head(force=True))
      >>> report = assert_recall(step, step.pack(w, x), [(x,)])
      >>> report.sites[0].recall
      (1.0,)
    """
    _check_step(step, rewrites=True)
    _check_number("at_least", at_least, 1.0)
    if not isinstance(packed, Packed):
        raise AssertionError(f"a Packed is needed, not a {type(packed).__name__}: see .pack(...)")
    # Known before anything is measured, and before weights are asked for that are of no use.
    if all(isinstance(rule, Linear) for rule in packed.rules):
        raise AssertionError(_NOTHING_PREDICTED)
    report = step.evaluate(packed, batches, **settings)
    if not any(site.k for site in report.sites):
        raise AssertionError(f"{_NOTHING_PREDICTED}:\n{report}")
    missed = [
        site.name for site in report.sites if not all(part >= at_least for part in site.recall)
    ]
    if missed:
        raise AssertionError(f"recall below {at_least} at {', '.join(missed)}:\n{report}")
    return report


_NOTHING_PREDICTED = (
    "nothing that is packed here predicts, so that there is no recall: give a Packed of a head or "
    "of an FFN with a top-k, or compare the whole with assert_no_change_of_meaning"
)


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
      AssertionError: with the report; the model has no vocabulary head outside of loops; nothing
        is rewritten; or an argument is not what it has to be.
      HireRewriteError: as `Transformed.pack` and `Transformed.evaluate` do.

    Examples:
      >>> import hire_rewrite as hire
      >>> w, x = jax.random.normal(jax.random.key(0), (64, 8192)), jnp.ones((1, 64))
      >>> step = hire.transform(lambda w, x: x @ w)
      >>> assert_no_change_of_meaning(step, w, [(x,)]).model.agreement
      1.0
    """
    _check_step(step, rewrites=True)
    _check_number("same_token", same_token, 1.0)
    _check_number("kl", kl, math.inf)
    if not isinstance(batches, Iterable):
        raise AssertionError(f"batches is a {type(batches).__name__}: {_BATCHES}")
    batches = list(batches)
    if not batches:
        raise AssertionError(f"there are no batches (a generator runs once alone): {_BATCHES}")
    if not isinstance(batches[0], tuple):
        raise AssertionError(f"batch 0 is a {type(batches[0]).__name__}: {_BATCHES}")
    call: list[Any] = list(batches[0])
    for position, argument in zip(
        step.weights, step._analyses.weight_arguments(params), strict=True
    ):
        call.insert(position, argument)
    packed = step.pack(*call, calibration=calibration)
    report = step.evaluate(packed, batches, weights=params)
    if report.model is None:
        raise AssertionError("the model has no vocabulary head outside of loops to compare")
    if not report.sites:
        raise AssertionError(
            "nothing is rewritten, so that its meaning is what it was: change the rules, or assert "
            f"that with assert_rewrites:\n{step.plan(*call)}"
        )
    if not report.model.agreement >= same_token or not report.model.kl <= kl:
        raise AssertionError(
            f"less than {same_token:.2%} of tokens the same, or a KL above {kl}:\n{report}"
        )
    return report


_BATCHES = "give tuples of the arguments after the weights, in a list"


def _check_step(step: Any, *, rewrites: bool = False) -> None:
    """Raise AssertionError if a function is not transformed.

    Args:
      rewrites: or has a mode in which it rewrites nothing, so that nothing is to be measured.
    """
    if not isinstance(step, Transformed):
        raise AssertionError(
            f"a transformed function is needed, not a {type(step).__name__}: give "
            "transform(fn, *rules)"
        )
    mode = _other_mode(step)
    if rewrites and mode is not None:
        raise AssertionError(
            f'{step.name} has mode="{mode}", in which nothing is rewritten: give it with '
            'mode="hire"'
        )


def _other_mode(step: Transformed) -> str | None:
    """The name of a mode in which nothing is predicted; None in the others."""
    names = (name for name, mode in MODES.items() if mode is step.mode and mode is not HIRE)
    return next(names, None)


def _check_number(name: str, value: Any, most: float = sys.float_info.max) -> None:
    """Raise AssertionError if a threshold is not a number from 0 to the greatest that it may be."""
    try:
        # Scalars of NumPy and JAX are numbers too, those of bfloat16 by name alone.
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= most:
        named = {math.inf: "of at least 0", sys.float_info.max: "of at least 0 that is finite"}
        wanted = named.get(most, f"between 0 and {most:g}")
        raise AssertionError(f"{name}={value!r} is not a number {wanted}")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _assert_close(got: Any, want: Any, tolerance: float, plan: str) -> None:
    structures: list[Any] = [jax.tree.structure(got), jax.tree.structure(want)]
    if structures[0] != structures[1]:
        raise AssertionError(f"the results are structured otherwise\n{plan}")
    paths = jax.tree_util.tree_leaves_with_path(want)
    told = False
    for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        where = f"result{jax.tree_util.keystr(path)}"
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise AssertionError(f"{where} is {a.dtype}{a.shape}, not {b.dtype}{b.shape}\n{plan}")
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            same, apart, by = bool((a == b).all()), 0.0, ""
            told |= b.size > 0
        else:
            wide = np.complex128 if jnp.issubdtype(b.dtype, jnp.complexfloating) else np.float64
            x, y = np.asarray(a, wide), np.asarray(b, wide)
            finite = np.isfinite(y)
            if np.isnan(y).any() and not finite.any():
                raise AssertionError(f"{where} is NaN without rewriting too: {_NUMBERS}")
            told |= bool(finite.any())
            greatest = float(np.abs(y[finite]).max(initial=0.0))
            # Rounding is a share of the greatest, down to where numbers are flushed to zero.
            limit = max(tolerance * greatest, float(jnp.finfo(b.dtype).tiny))
            with np.errstate(invalid="ignore"):
                apart = float(np.abs(x[finite] - y[finite]).max(initial=0.0))
            rest = np.array_equal(x[~finite], y[~finite], equal_nan=True)
            same, by = apart <= limit and rest, f" of up to {greatest:.3g}"
        if not same:
            raise AssertionError(f"{where} differs, by {apart:.3g} at most{by}\n{plan}")
    if paths and not told:
        raise AssertionError(f"no result holds a finite number: {_NUMBERS}")


_NUMBERS = "give weights and inputs with which something can be compared"
