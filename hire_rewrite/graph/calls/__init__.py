"""Call-like primitives: how to see through each, and how to write it again.

One table for every pass. `inline` holds the calls that only group code; `scan`, `while_loop`,
`cond` and `shard_map` have a file each. A primitive that is not in the table but holds a jaxpr is
opaque: it is left as it is, and the plan names it. To add one, write a class and register it here.
"""

from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.calls.cond import Cond
from hire_rewrite.graph.calls.inline import Checkpoint, CustomDerivative, Jit, Plain
from hire_rewrite.graph.calls.scan import Scan
from hire_rewrite.graph.calls.shard_map import ShardMap
from hire_rewrite.graph.calls.table import (
    BodyResult,
    BodySpec,
    BodyWriter,
    InlineCall,
    StructuredCall,
    inline_calls,
    structured_calls,
)
from hire_rewrite.graph.calls.while_loop import While

CUSTOM_DERIVATIVES = frozenset({p.custom_jvp_call_p, p.custom_vjp_call_p})
"""Calls that bring a derivative of their own."""

__all__ = [
    "CUSTOM_DERIVATIVES",
    "BodyResult",
    "BodySpec",
    "BodyWriter",
    "InlineCall",
    "StructuredCall",
    "inline_calls",
    "structured_calls",
]

inline_calls.update(
    {
        p.jit_p: Jit(),
        p.remat_p: Checkpoint(),
        p.custom_jvp_call_p: CustomDerivative(),
        p.custom_vjp_call_p: CustomDerivative(),
        p.closed_call_p: Plain(),
        p.call_p: Plain(),
    }
)
structured_calls.update(
    {p.scan_p: Scan(), p.while_p: While(), p.cond_p: Cond(), _compat.shard_map_p: ShardMap()}
)
