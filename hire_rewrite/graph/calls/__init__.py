"""Call-like primitives: how to see through each, and how to write it again.

`inline` has the calls that only group code, `structured` loops, branches and `shard_map`. What is
in neither table but holds code is left as it is, and the plan names it. To add a primitive, write a
class and register it in its table.
"""

from hire_rewrite.graph.calls.inline import inline_call
from hire_rewrite.graph.calls.structured import structured_calls
from hire_rewrite.graph.calls.table import BodyResult, InlineCall

__all__ = ["BodyResult", "InlineCall", "inline_call", "structured_calls"]
