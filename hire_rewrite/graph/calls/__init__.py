"""Call-like primitives: how to see through each, and how to write it again.

`inline` has the calls that only group code, `control` loops and branches; these and `shard_map`
stand in the table `structured_calls`. A primitive that is in neither but holds code
is left as it is, and the plan names it. To add one, write a class and register it here.
"""

from typing import Any

from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.calls.control import Cond, Scan, While
from hire_rewrite.graph.calls.inline import inline_call
from hire_rewrite.graph.calls.shard_map import ShardMap
from hire_rewrite.graph.calls.table import (
    BodyResult,
    InlineCall,
    StructuredCall,
)

__all__ = [
    "BodyResult",
    "InlineCall",
    "inline_call",
    "structured_calls",
]

structured_calls: dict[Any, StructuredCall] = {
    p.scan_p: Scan(),
    p.while_p: While(),
    p.cond_p: Cond(),
    _compat.shard_map_p: ShardMap(),
}
