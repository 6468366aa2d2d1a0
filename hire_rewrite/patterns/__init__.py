"""What the package looks for in a flattened jaxpr, by what primitives do (`graph.traits`).

`axes` knows which operations act separately on each position of a `Window`, `layout` those that
move, cut or merge positions. `linear` finds products with a weight; the backward `slice` of one
leads to those before it; the `region` that it passed can be run on some positions. A `refusal` says
why something is not a site.
Nothing here knows a kind of site, or how a function is traced or rewritten.
"""

from hire_rewrite.patterns import layout as layout  # registers its rules
