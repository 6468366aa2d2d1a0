"""What the package does, a verb each; none of them knows a kind of site.

The way of a function: `graph.trace` flattens it, `detect` finds its sites, `decide` matches rules
with them (`listing` makes the plan's rows of that, `flow` its layers in order), `calibrate` has
them say what they see, `examine` looks at their numbers, `pack` lays out their weights, `rewrite`
emits the function with the sites' operations in their place (`modes` says which form of them,
`schedule` orders the code).
`evaluate` has sites report what they miss, on batches that `accumulate` adds up, and `summarize`
makes figures of it; `tune` chooses rules by recall, `budget` by divergence, both beside the
`logits` of the dense model. `diff` shows what was changed, and `draw` how much of
what is read.
"""
