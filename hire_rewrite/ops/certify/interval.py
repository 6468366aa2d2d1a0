"""Between which numbers the results of code lie, if all that is known of its arguments are bounds.

The arithmetic of intervals (Moore, *Interval Analysis*, 1966): each operation is given the ends of
its operands and returns ends of its result. Code is read as a jaxpr and each operation looked up
here; of what is not known nothing is said. Ends are in float32 and rounded outwards, by more than
what a compiler may do in another way: fuse a product with a sum, round to bfloat16 or not, or flush
numbers below the normal range to zero. Ends that are numpy's are computed by numpy, where no
program has to be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.ops.certify.bodies import body_of

__all__ = ["Interval", "enclosure"]

_TINY = 2.0**-126
_UNITS = {jnp.dtype("float32"): 2.0**-21, jnp.dtype("bfloat16"): 2.0**-7}
"""Eight times and twice the rounding of a result, which leaves room for what fusing changes."""
_NAN = np.float32(np.nan)


class Interval(NamedTuple):
    """Numbers from `low` to `high`: f32[...], or bool[...] of truth values. NaN at one of the ends
    says that nothing is known."""

    low: Array | np.ndarray
    high: Array | np.ndarray

    @property
    def is_zero(self) -> Any:
        """bool[...], whether there is no other number in it."""
        return (self.low == 0) & (self.high == 0)


def _np(*operands: Any) -> Any:
    """numpy, or jax.numpy for operands of JAX."""
    return jnp if any(isinstance(each, jax.Array) for each in operands) else np


def enclosure(code: Callable[..., Any], ins: Sequence[Interval], dtype: Any) -> Interval:
    """The interval of the result of `code`, which is pointwise or moves numbers.

    Args:
      code: a function of as many arrays as there are intervals, to one array. Other arrays that it
        reads are taken for exact.
      dtype: of the arrays that it is called with, float32 or bfloat16.

    Examples:
      >>> narrow = Interval(jnp.array([-2.0, -2.0]), jnp.array([-1.0, 1.0]))
      >>> wide = Interval(jnp.array([-9.0, -9.0]), jnp.array([9.0, 9.0]))
      >>> gated = enclosure(lambda a, b: jax.nn.relu(a) * b, [narrow, wide], jnp.float32)
      >>> gated.is_zero.tolist()
      [True, False]
    """
    closed = jax.make_jaxpr(code)(*(jax.ShapeDtypeStruct(i.low.shape, dtype) for i in ins))
    jaxpr, consts = _compat.open_jaxpr(closed)
    with np.errstate(all="ignore"):  # of ends that are infinite, or nothing is known of
        (result,) = _walk(jaxpr, consts, [_rounded(interval, dtype) for interval in ins])
        return _interval(result)


def _walk(jaxpr: Any, consts: Sequence[Any], ins: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr; operands and results are intervals, or arrays that are exact: what
    was given, and integers that are made of such (at which place numbers are, as of an expert)."""
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, ins, strict=True))
    for eqn in jaxpr.eqns:
        operands, body = [read(atom) for atom in eqn.invars], body_of(eqn)
        outs = [_step(eqn, operands)] if body is None else _walk(body, (), operands)
        env.update(zip(eqn.outvars, outs, strict=False))
        for var in eqn.outvars[len(outs) :]:
            env[var] = _unknown(var.aval)
    return [read(atom) for atom in jaxpr.outvars]


def _step(eqn: Any, operands: Sequence[Any]) -> Any:
    exact = [not isinstance(operand, Interval) for operand in operands]
    counts = all(exact) and all(map(_counts, (*eqn.invars, *eqn.outvars)))
    if counts and not eqn.primitive.multiple_results:
        return _bind(eqn, *operands)
    if eqn.primitive is p.dynamic_slice_p and all(exact[1:]):
        of, *starts = _interval(operands[0]), *operands[1:]
        return Interval(*(_bind(eqn, end, *starts) for end in of))
    return _enclosed(eqn, list(map(_interval, operands)))


def _bind(eqn: Any, *operands: Any) -> Any:
    """The operation itself; of numbers of numpy it makes such."""
    result = eqn.primitive.bind(*operands, **eqn.params)
    own = isinstance(result, jax.core.Tracer) or any(isinstance(x, jax.Array) for x in operands)
    return result if own else np.asarray(result)


def _counts(atom: Any) -> bool:
    """Whether an operand is of integers or truth values."""
    return jnp.issubdtype(atom.aval.dtype, jnp.integer) or atom.aval.dtype == jnp.bool_


def _interval(value: Any) -> Interval:
    return value if isinstance(value, Interval) else _exactly(value)


def _enclosed(eqn: Any, operands: Sequence[Interval]) -> Interval:
    primitive, aval = eqn.primitive, eqn.outvars[0].aval
    if primitive in _compat.varying_casts:  # ends may differ from device to device already
        return Interval(*(_compat.varying_like(jnp.asarray(end), aval) for end in operands[0]))
    if len(eqn.outvars) == 1:
        if has(primitive, Trait.MOVES | Trait.KEEPS | Trait.CUTS) and len(operands) == 1:
            return Interval(*(_bind(eqn, end) for end in operands[0]))
        if primitive is p.pad_p:
            return Interval(*(_bind(eqn, *ends) for ends in zip(*operands, strict=True)))
        rule = _RULES.get(primitive)
        known = all(_is_known(atom.aval.dtype) for atom in (*eqn.invars, *eqn.outvars))
        if rule is not None and (known or _widens_integers(eqn)):
            low, high = rule(*operands, **eqn.params)
            ends = Interval(*(_np(end).broadcast_to(end, aval.shape) for end in (low, high)))
            return ends if primitive not in _ROUNDING else _rounded(ends, aval.dtype)
    return _unknown(aval)


def _is_known(dtype: Any) -> bool:
    return jnp.dtype(dtype) in _UNITS or dtype == jnp.bool_


def _widens_integers(eqn: Any) -> bool:
    cast, source = eqn.primitive is p.convert_element_type_p, eqn.invars[0].aval.dtype
    return cast and jnp.issubdtype(source, jnp.integer) and _is_known(eqn.outvars[0].aval.dtype)


def _exactly(value: Any) -> Interval:
    array = value if isinstance(value, jax.Array) else np.asarray(value, jnp.result_type(value))
    if array.dtype == jnp.bool_:
        return Interval(array, array)
    wide = array.astype(jnp.float32)
    ends = Interval(wide, wide)
    return ends if _is_known(array.dtype) else _rounded(ends, jnp.float32)


def _unknown(aval: Any) -> Interval:
    if aval.dtype == jnp.bool_:
        return Interval(np.zeros(aval.shape, bool), np.ones(aval.shape, bool))
    nothing = np.full(aval.shape, np.nan, np.float32)
    return Interval(nothing, nothing)


def _rounded(ends: Interval, dtype: Any) -> Interval:
    """Ends that lie outside of whatever may have been rounded; zero alone stays what it is."""
    if dtype == jnp.bool_:
        return ends
    unit, zero = _UNITS[jnp.dtype(dtype)], ends.is_zero

    def off(end: Any) -> Any:
        return _np(end).where(zero, np.float32(0.0), unit * abs(end) + _TINY)

    return Interval(ends.low - off(ends.low), ends.high + off(ends.high))


def _of_ends(ends: Sequence[Any]) -> Interval:
    """The least and the greatest; NaN if one is."""
    low = high = ends[0]
    for end in ends[1:]:
        low, high = _np(low, end).minimum(low, end), _np(high, end).maximum(high, end)
    return Interval(low, high)


def _mul(a: Interval, b: Interval, **_: Any) -> Interval:
    return _of_ends([x * y for x in a for y in b])


def _div(a: Interval, b: Interval, **_: Any) -> Interval:
    apart = (b.low > 0) | (b.high < 0)
    low, high = _of_ends([x / y for x in a for y in b])
    return Interval(*(_np(apart, end).where(apart, end, _NAN) for end in (low, high)))


def _abs(a: Interval, **_: Any) -> Interval:
    around = (a.low <= 0) & (a.high >= 0)
    ends = _of_ends([abs(a.low), abs(a.high)])
    return Interval(_np(around).where(around, np.float32(0.0), ends.low), ends.high)


def _power(a: Interval, *, y: int, **_: Any) -> Interval:
    if y < 1:
        nothing = _np(a.low).full_like(a.low, _NAN)
        return Interval(nothing, nothing)
    base = _abs(a) if y % 2 == 0 else a
    return Interval(base.low**y, base.high**y)


def _select(which: Interval, *cases: Interval, **_: Any) -> Interval:
    if len(cases) != 2 or which.low.dtype != jnp.bool_:
        nothing = _np(cases[0].low).full_like(cases[0].low, _NAN)
        return Interval(nothing, nothing)
    no, yes = cases
    if no.low.dtype == jnp.bool_:
        either = Interval(no.low & yes.low, no.high | yes.high)
    else:
        either = _of_ends([*no, *yes])
    numpy = _np(*which, *no, *yes)
    ends = zip(no, yes, either, strict=True)
    return Interval(*(numpy.where(which.low, y, numpy.where(which.high, e, n)) for n, y, e in ends))


def _cast(a: Interval, *, new_dtype: Any, **_: Any) -> Interval:
    if new_dtype == jnp.bool_:
        if a.low.dtype == jnp.bool_:
            return a
        zero, apart = a.is_zero, (a.low > 0) | (a.high < 0)
        return Interval(apart, ~zero)
    return Interval(a.low.astype(jnp.float32), a.high.astype(jnp.float32))


def _reduced(a: Interval, **params: Any) -> Interval:
    """A compiler may leave the rounding out, too."""
    low, high = (_as(end, lax.reduce_precision(jnp.asarray(end), **params)) for end in a)
    return Interval(_np(a.low).minimum(a.low, low), _np(a.high).maximum(a.high, high))


def _as(like: Any, made: Any) -> Any:
    """As numpy's, if the other is."""
    return np.asarray(made) if isinstance(like, np.ndarray | np.generic) else made


def _between(low: float, high: float) -> Callable[..., Interval]:
    """Of a function whose results lie there, if it has an argument."""

    def rule(a: Interval, **_: Any) -> Interval:
        known = (a.low == a.low) & (a.high == a.high)
        return Interval(*(_np(known).where(known, np.float32(end), _NAN) for end in (low, high)))

    return rule


def _each(name: str) -> Callable[..., Interval]:
    """Of a function of numpy that rises with all of its operands."""
    return lambda *operands, **_: Interval(
        *(getattr(_np(*ends), name)(*ends) for ends in zip(*operands, strict=True))
    )


def _comparison(surely: Callable[..., Array], perhaps: Callable[..., Array]) -> Any:
    return lambda a, b, **_: Interval(surely(a, b), ~perhaps(a, b))


_least, _most = _each("minimum"), _each("maximum")

# A comparison is surely true, or (the second) surely false; of NaN neither.
_RULES: dict[Any, Callable[..., Any]] = {
    p.add_p: _each("add"),
    p.sub_p: lambda a, b, **_: Interval(a.low - b.high, a.high - b.low),
    p.mul_p: _mul,
    p.div_p: _div,
    p.neg_p: lambda a, **_: Interval(-a.high, -a.low),
    p.max_p: _most,
    p.min_p: _least,
    p.clamp_p: lambda low, x, high, **_: _least(_most(x, low), high),
    p.abs_p: _abs,
    p.square_p: lambda a, **_: _power(a, y=2),
    p.integer_pow_p: _power,
    p.sign_p: _each("sign"),
    p.select_n_p: _select,
    p.convert_element_type_p: _cast,
    p.reduce_precision_p: _reduced,
    p.tanh_p: _between(-1.0, 1.0),
    p.erf_p: _between(-1.0, 1.0),
    p.logistic_p: _between(0.0, 1.0),
    p.gt_p: _comparison(lambda a, b: a.low > b.high, lambda a, b: a.high <= b.low),
    p.ge_p: _comparison(lambda a, b: a.low >= b.high, lambda a, b: a.high < b.low),
    p.lt_p: _comparison(lambda a, b: a.high < b.low, lambda a, b: a.low >= b.high),
    p.le_p: _comparison(lambda a, b: a.high <= b.low, lambda a, b: a.low > b.high),
    p.not_p: lambda a, **_: Interval(~a.high, ~a.low),
    p.and_p: _each("logical_and"),
    p.or_p: _each("logical_or"),
}
_ROUNDING = frozenset(
    (p.add_p, p.sub_p, p.mul_p, p.div_p, p.square_p, p.integer_pow_p, p.convert_element_type_p,
     p.reduce_precision_p)
)  # fmt: skip
