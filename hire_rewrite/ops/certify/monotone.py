"""Whether a model's own code behind the logits keeps their order, and how exactly.

A bound of a logit says something about what the model makes of it only if each value depends on its
own logit alone, and rises or falls with it. Which of both may be unknown (a scale can be negative),
and may differ from row to row. Code between is read as a jaxpr and each operation looked up here;
what is not known to be monotone is taken for not monotone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.traits import Trait, has, is_widening, slope
from hire_rewrite.ops.certify.bodies import body_of

__all__ = ["Chain", "examine"]


@dataclasses.dataclass(frozen=True)
class Chain:
    """What is known about code behind logits.

    Attributes:
      obstacle: why it may not be monotone; None if it is.
      plain: whether it only moves, masks and widens logits, so that nothing is rounded.
      unit: the coarsest rounding in it, relatively.
    """

    obstacle: str | None
    plain: bool
    unit: float


def examine(code: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> Chain:
    """Read `code`, which is called with one array of logits of that shape and dtype."""
    closed = jax.make_jaxpr(code)(jax.ShapeDtypeStruct(shape, dtype))
    seen = _Seen(jnp.dtype(dtype))
    taints_out = seen.walk(_compat.open_jaxpr(closed)[0], [True])
    reason = next((taint for taint in taints_out if isinstance(taint, str)), None)
    return Chain(reason, seen.plain, seen.unit)


_Taint = str | bool
"""How a value depends on the logits: False for not at all, True for monotonely, or the reason why
perhaps not so."""


@dataclasses.dataclass
class _Seen:
    raw: Any
    plain: bool = True
    unit: float = 2.0**-24

    def walk(self, jaxpr: Any, taints: list[Any]) -> list[Any]:
        """Taints of a jaxpr's results, for those of its inputs; `False` for no dependence."""
        known = {
            v: taint for v, taint in zip(jaxpr.invars, taints, strict=True) if taint is not False
        }

        def taint_of(atom: Any) -> Any:
            return False if hasattr(atom, "val") else known.get(atom, False)

        for eqn in jaxpr.eqns:
            ins = [taint_of(atom) for atom in eqn.invars]
            if not any(ins) or not eqn.outvars:
                continue
            body = body_of(eqn)
            if body is None:
                outs = [self._step(eqn, ins)] * len(eqn.outvars)
            else:
                outs = self.walk(body, ins)
            known.update(zip(eqn.outvars, outs, strict=True))
        return [taint_of(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, ins: list[_Taint]) -> _Taint:
        primitive, dtype = eqn.primitive, eqn.outvars[0].aval.dtype
        touched = [i for i, taint in enumerate(ins) if taint]
        for taint in ins:
            if isinstance(taint, str):
                return taint
        slopes = {slope(primitive, i) for i in touched}
        chooses = primitive is p.select_n_p
        if has(primitive, Trait.MOVES | Trait.KEEPS | Trait.CUTS) and "." not in slopes:
            return True
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
            # Small float16 numbers are not rounded relatively, and great ones overflow.
            return f"{primitive} makes {dtype} of logits"
        if "." in slopes or (len(touched) > 1 and not chooses):
            return f"{primitive} of logits may not keep their order"
        # A threshold in another type than the logits' may lie between a logit and its rounding.
        plain = chooses and dtype == self.raw
        if has(primitive, Trait.CASTS):
            plain = is_widening(eqn.invars[0].aval.dtype, dtype)
        self._use(dtype, plain=plain)
        return True

    def _use(self, dtype: Any, *, plain: bool) -> None:
        self.plain = self.plain and plain
        if not plain:
            mantissa = jnp.finfo(dtype).nmant if jnp.issubdtype(dtype, jnp.floating) else 0
            self.unit = max(self.unit, 2.0 ** -(int(mantissa) + 1))
