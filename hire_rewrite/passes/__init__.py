"""What the package does, a verb each.

`trace` flattens a function, `detect` finds its sites, `estimate` counts bytes, `decide` matches
rules with sites, `calibrate` and `pack` prepare the weights, `rewrite` emits the new function, and
`diff` shows it. `calls` is the one table of primitives that hold jaxprs.
"""
