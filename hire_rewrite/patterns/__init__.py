"""What the package looks for: FFN blocks and vocabulary heads in a flattened jaxpr.

`graph` holds the flattened function, `provenance` says where a value comes from, `axes` knows
which operations act separately on each position of an axis, `linear` finds products with a
weight, `region` walks from one product to the next, and `ffn` and `head` put these together.
Nothing here knows how a function is traced or rewritten.
"""
