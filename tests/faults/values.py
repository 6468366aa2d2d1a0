"""Odd values, shapes, dtypes and settings of JAX, and what rewritten functions make of them.

Each kind of `kinds.py` is rewritten, its weights and inputs are made odd in one way each, and its
result is compared with the original's, token by token:

* `"same"`, for rules that lose nothing: the same numbers to the rounding of sums, and NaN and
  infinity where the original has them.
* `"part"`, for rules that leave something out: no NaN and no infinity where the original has a
  number, and none lost where the original has nothing else.

Where finite numbers overflow in the original, nothing is asked for. A `HireRewriteError` is a
refusal and not a mistake, as long as it names the site; where the original raises, the rewritten
function must too.

    python -m tests.faults.values                # all of it, about an hour, and the record
    python -m tests.faults.values --every 100    # one trial of a hundred
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hire_rewrite as hire
from tests.faults.kinds import (
    KINDS,
    ODD,
    D,
    Kind,
    near_ties,
    normal,
    shapes_of,
    top_k_block,
)

TOKENS = [name for name in ODD if not name.startswith("one row")]
"""How a token can be odd."""

TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2, "float64": 1e-9}
"""Of results, as a share of a token's greatest; 1e-4 of any other."""

SETTINGS: Mapping[str, Callable[[], Any]] = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "tracer leaks": lambda: jax.checking_leaks(),
    "x64": lambda: jax.enable_x64(True),
    "no jit": lambda: jax.disable_jit(),
    **{
        f"precision {name}": lambda name=name: jax.default_matmul_precision(name)
        for name in ("bfloat16", "tensorfloat32", "float32", "highest", "BF16_BF16_F32")
    },
}
ROUNDED: Mapping[str, Sequence[str]] = {
    "cpu": ("precision bfloat16", "precision BF16_BF16_F32"),
    "gpu": ("precision bfloat16", "precision BF16_BF16_F32", "precision tensorfloat32"),
}
"""Settings with which two products of the same matrices differ by more than float32 does."""
NARROWED = hire.Float("float32")
"""An encoding that loses something of float64 alone."""
NARROW = {"float8_e4m3fn": 1.0, "float8_e5m2": 1.0, "int8": 0.02, "int4": 0.1}
"""Dtypes of weights that the function widens itself, and what it multiplies them with."""


@dataclasses.dataclass
class Count:
    """What came of trials.

    Attributes:
      tried: results of tokens that were compared, and calls that raised.
      refused: functions that packing or planning refused, by the reason's beginning.
      wrong: mistakes, in words.
    """

    tried: int = 0
    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)


def inputs(d: int = D) -> np.ndarray:
    """f32[tokens, d], a token of each of `TOKENS`."""
    usual = normal((1, d), 3)[0]
    return np.stack([ODD[name](usual) for name in TOKENS]).reshape(len(TOKENS), d)


def params_of(kind: Kind, weights: str = "normal", only: str | None = None) -> dict[str, Any]:
    """f32 weights of a kind, all odd in one way, or one of them."""
    params = {name: normal(shape, i) for i, (name, shape) in enumerate(kind.shapes.items())}
    odd = params if only is None else {only: params[only]}
    with np.errstate(all="ignore"):
        return params | {name: ODD[weights](array) for name, array in odd.items()}


def mistakes(
    kind: Kind, got: Any, want: Any, finite: Any, part: Any, tolerance: float
) -> Iterator[str]:
    """What is wrong with the results of tokens, [tokens, n] both.

    Args:
      finite: bool[tokens], whether neither a token nor a weight is infinite or NaN.
      part: bool[tokens], to which the law of a part applies.
    """
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        yield f"{got.dtype}{got.shape} instead of {want.dtype}{want.shape}"
        return
    for name, *rows in zip(range(len(want)), got, want, finite, part, strict=True):
        g, w = (np.asarray(row, np.float64) for row in rows[:2])
        number = np.isfinite(w)
        if rows[2] and not number.all():
            continue  # it overflows
        if rows[3]:
            lowered = any(getattr(rule, "tail", "") == "-inf" for rule in kind.rules)
            lost = ~np.isfinite(g) & number & ~(lowered & np.isneginf(g))
            if lost.any():
                yield f"token {name}: {lost.sum()} numbers became NaN or infinite"
            elif w.size and not number.any() and np.isfinite(g).all():
                yield f"token {name}: what is not finite became numbers"
        elif not np.array_equal(g[~number], w[~number], equal_nan=True):
            yield f"token {name}: NaN or infinity became something else"
        elif not (off := _off(g[number], w[number])) <= tolerance:  # NaN is not
            yield f"token {name}: off by {off:.1e} of the greatest number"


def _off(got: np.ndarray, want: np.ndarray) -> float:
    """The greatest difference of finite numbers, as a share of the greatest."""
    greatest = np.abs(want).max(initial=0) + 1e-32
    return float(np.abs(got - want).max(initial=0) / greatest)


def attempt(
    count: Count, what: str, kind: Kind, params: Mapping[str, Any], x: Any, batch: int = 4,
    dtype: str = "float32", setting: Callable[[], Any] = contextlib.nullcontext,
) -> None:  # fmt: skip
    """Compares a kind's rewritten function with the original, `batch` tokens at a time."""
    with setting(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params, x = jax.tree.map(jnp.asarray, dict(params)), jnp.asarray(x)
        step, fn = hire.transform(kind.fn, *kind.rules), _jitted(kind.fn)
        calls = [x[i : i + batch] for i in range(0, max(1, len(x)), batch)]
        try:
            wants = [np.asarray(fn(params, call)) for call in calls]
        except Exception as error:  # then the rewritten one must raise too
            wants = [error]
        try:
            usual = jnp.asarray(normal((40, x.shape[1]), 9)).astype(x.dtype)
            packed = step.pack(params, calls[0], calibration=[(usual,)])
            run = jax.jit(step)
            gots = [np.asarray(run(packed, call)) for call in calls]
        except hire.HireRewriteError as error:
            count.refused[f"{kind}: {str(error)[:80]}"] += 1
            count.tried += 1
            return
        except Exception as error:
            count.tried += 1
            if not isinstance(wants[0], type(error)):
                count.wrong.append(f"{kind}, {what}: {type(error).__name__}: {str(error)[:200]}")
            return
    if isinstance(wants[0], Exception):
        count.wrong.append(f"{kind}, {what}: did not raise {wants[0]}")
        return
    known = all(np.isfinite(np.asarray(w, np.float32)).all() for w in jax.tree.leaves(params))
    for call, got, want in zip(calls, gots, wants, strict=True):
        finite = np.isfinite(np.asarray(call, np.float32)).all(-1) & known
        count.tried += len(want)
        part = np.full(len(want), kind.law == "part")
        if kind.fn is top_k_block:
            part |= near_ties(params, call)
        found = mistakes(kind, got, want, finite, part, TOLERANCE.get(dtype, 1e-4))
        count.wrong += [f"{kind}, {what}: {mistake}" for mistake in found]


_COMPILED: dict[Any, Any] = {}


def _jitted(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of a function, one for all calls."""
    return _COMPILED.setdefault(fn, jax.jit(fn))


def of_values(kind: Kind, count: Count, weights: str, only: str | None = None) -> None:
    """All odd tokens, together and each alone, with odd weights."""
    params = params_of(kind, weights, only)
    for batch in (4, 1):
        attempt(
            count,
            f"weights {weights} ({only or 'all'}), {batch} at a time",
            kind,
            params,
            inputs(),
            batch,
        )


def of_dtype(kind: Kind, count: Count, dtype: str) -> None:
    """Weights and usual tokens of another dtype."""
    params, x = params_of(kind), normal((3, D), 8)
    if dtype in NARROW:
        factor, fn = NARROW[dtype], kind.fn
        kind = dataclasses.replace(
            kind, fn=lambda p, x: fn({k: v.astype(jnp.float32) * factor for k, v in p.items()}, x)
        )
        params = {
            name: np.asarray(w / factor).round() if "int" in dtype else w
            for name, w in params.items()
        }
        if dtype == "int4":
            params = {name: w.clip(-8, 7) for name, w in params.items()}
        cast = {name: jnp.asarray(w).astype(dtype) for name, w in params.items()}
        attempt(count, f"weights {dtype}", kind, cast, x)
        return
    wide = dtype == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        cast = {name: jnp.asarray(w).astype(dtype) for name, w in params.items()}
        x = jnp.asarray(x).astype(dtype)
    setting = SETTINGS["x64"] if wide else contextlib.nullcontext
    narrowed = wide and any(getattr(rule, "encoding", None) == NARROWED for rule in kind.rules)
    of = "float32" if narrowed else dtype  # how near the results are to be
    attempt(count, dtype, kind, cast, x, dtype=of, setting=setting)


SHAPES = {
    "1 neuron, 1 row": (8, 1, 1), "1 input": (1, 8, 8), "all 1": (1, 1, 1), "odd": (33, 7, 101),
    "no inputs": (0, 8, 8), "no neurons, no rows": (8, 0, 0), "nothing": (0, 0, 0),
}  # fmt: skip


def of_shape(kind: Kind, count: Count, shape: str, tokens: int) -> None:
    """Arrays of odd sizes; what rules count is a share of what there is."""
    sizes = SHAPES[shape]
    rules = []
    for rule in kind.rules:
        settings = {} if isinstance(rule.k, str) or not rule.k else {"k": 0.5}
        if getattr(rule, "candidates", None):
            settings |= (
                {"k": 0.5, "candidates": 0.75}
                if kind.law == "part"
                else {"k": 1.0, "candidates": 1.0}
            )
        if isinstance(rule, hire.Head):
            settings["min_width"] = 1
        rules.append(rule.replace(**settings))
    kind = dataclasses.replace(kind, shapes=shapes_of(kind.fn, *sizes), rules=tuple(rules))
    attempt(
        count, f"{shape}, {tokens} tokens", kind, params_of(kind), normal((tokens, sizes[0]), 8)
    )


def of_setting(kind: Kind, count: Count, setting: str) -> None:
    """Usual numbers, zeros and denormals under a setting of JAX."""
    if setting in ROUNDED.get(jax.default_backend(), ROUNDED["cpu"]):
        kind = dataclasses.replace(kind, law="part")
    x = inputs()[[TOKENS.index(name) for name in ("normal", "zeros", "denormals", "outlier")]]
    attempt(count, setting, kind, params_of(kind), x, setting=SETTINGS[setting])


def grid() -> Iterator[tuple[str, Callable[[Count], None]]]:
    """All trials: of what, and what counts them."""
    for kind in KINDS.values():
        for weights in ODD:
            several = len(kind.shapes) > 1 and weights != "normal"
            for only in (None, *kind.shapes) if several else (None,):
                yield (
                    "odd values of weights and inputs",
                    lambda c, a=(kind, weights, only): of_values(a[0], c, *a[1:]),
                )
        for dtype in ("bfloat16", "float16", "float64", *NARROW):
            yield "dtypes", lambda c, a=(kind, dtype): of_dtype(a[0], c, a[1])
        for shape in SHAPES:
            for tokens in (0, 1, 3):
                yield "odd shapes", lambda c, a=(kind, shape, tokens): of_shape(a[0], c, *a[1:])
        lowered = any(getattr(rule, "tail", "") == "-inf" for rule in kind.rules)
        for setting in SETTINGS:
            if lowered and setting == "debug_infs":
                continue  # it asks for what the setting refuses
            yield "settings of JAX", lambda c, a=(kind, setting): of_setting(a[0], c, a[1])


def main() -> int:
    from benchmarks import timing

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="one trial of so many")
    every = parser.parse_args().every
    began, counts = time.time(), dict[str, Count]()
    for i, (what, trial) in enumerate(itertools.islice(grid(), 0, None, every)):
        trial(counts.setdefault(what, Count()))
        if i % 200 == 199:
            print(f"{i + 1} trials, {time.time() - began:.0f} s", flush=True)
            jax.clear_caches()
    rows = []
    for what, count in counts.items():
        for mistake in count.wrong:
            print(mistake)
        refused = sum(count.refused.values())
        note = f"{refused} were refused with a HireRewriteError"
        rows.append({"what": what, "tried": count.tried, "wrong": len(count.wrong), "note": note})
        print(rows[-1])
    about = (
        f"{len(KINDS)} kinds of sites and rules with NaN, infinities, denormals, zeros, ties, huge "
        "and tiny numbers in weights and inputs, in sizes from 0 on, in other dtypes and under "
        "settings of JAX; each token's result against the original function's. "
        f"{'All trials' if every == 1 else f'One of {every} trials'}: {time.time() - began:.0f} s."
    )
    timing.write(
        timing.of_backend("reliability_values"),
        {"about": about, "rows": rows},
        f"python -m tests.faults.values --every {every}",
    )
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (it sets the environment before anything is computed)

    sys.exit(main())
