"""The one file that knows jax versions.

jax moves its internal data structures between minor releases. Everything that the
package reads from a jaxpr and that differed between jax 0.10 and 0.12 is asked here, by
looking at what is there rather than at a version number where that says it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex_core


def open_jaxpr(closed: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr of a closed one and the constants for its `constvars`.

    Up to jax 0.10 a `ClosedJaxpr` wraps a `Jaxpr`; from 0.11 both are one class, which
    carries its own constants.
    """
    jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
    consts = closed.consts if hasattr(closed, "consts") else ()
    return jaxpr, consts


def is_jaxpr(obj: Any) -> bool:
    """Whether `obj` is a jaxpr, open or closed."""
    return isinstance(obj, jex_core.Jaxpr | jex_core.ClosedJaxpr)


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a `scan` are constants and how many are carried.

    jax 0.10 counts them (`num_consts`, `num_carry`); later versions store the flat trees of
    the operands instead (`ft_in`: constants, carry, sliced inputs).
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _primitive_of(fun: Callable[..., Any]) -> Any:
    """The primitive behind a public function, for those that `jax.extend` does not name."""
    jaxpr, _ = open_jaxpr(jax.make_jaxpr(fun)(jax.ShapeDtypeStruct((2,), np.float32)))
    return jaxpr.eqns[0].primitive


split_p = _primitive_of(lambda x: lax.split(x, (1, 1)))
optimization_barrier_p = _primitive_of(lax.optimization_barrier)

cpu_fuses_widening = jax.__version_info__ < (0, 12)
"""Whether XLA's CPU backend emits vector code for a vector-matrix product that is fused with the
widening of the matrix. From jaxlib 0.12 on it adds up one number at a time, in order: 9 times
slower, so that other forms are better there."""
