"""What the package does, a verb each.

`trace` flattens a function, `detect` finds its sites, `estimate` tells what they read and how long
that takes, `decide` matches rules with sites, `calibrate` and `pack` prepare the weights, `rewrite`
emits the new function, and `diff` shows it. What takes the place of a site is in `replace` (from
packed weights) and `raw` (from weights as they are). `observe` adds up what sites report on
batches, `evaluate` has them report what they miss, and `summarize` makes figures of it. `calls` is
the one table of primitives that hold jaxprs.
"""
