"""The function as a graph: traced, flattened, and turned back into code.

`trace` makes a `Trace` of a function: its jaxpr, flattened (`flatten`) to `nodes` in scopes, with
what is known of its values: which are weights (`provenance`), which anybody needs (`liveness`),
and along which mesh axes they vary (`varying`). `calls` sees through the primitives that hold
jaxprs and writes them again; `opaque` names those that nobody looks into. `traits` is the one
table of what primitives do, `evaluate` the one place where an equation becomes code; `effects`
says what must keep its order. `weights` computes weights outside of loops, and `feeds`
says which products read which.
"""
