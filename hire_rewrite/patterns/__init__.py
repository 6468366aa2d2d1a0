"""What the package looks for: FFN blocks and vocabulary heads in a flattened jaxpr.

`graph` holds the flattened function, `provenance` says where a value comes from, `window` says
which positions of it are meant. `axes` knows which operations act separately on each of them,
`layout` those that move, cut or merge them (and `one_hot` which products only choose). `linear`
finds products with a weight; `grow` walks from one back to the next; the `region` that it passed
can be run on some positions, and `activation` names it. `logits` follows a vocabulary to its
readers. `ffn` and `head` put these together.
Nothing here knows how a function is traced or rewritten.
"""

from hire_rewrite.patterns import layout as layout  # registers its rules
