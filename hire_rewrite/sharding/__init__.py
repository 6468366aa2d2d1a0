"""How the weight rows of a site lie on devices: one model for all passes.

`rows` has the model and two of its forms: rows where the compiler puts them, and rows that are
sharded over axes of a mesh. `manual` has the third: a site inside the function's own `shard_map`.
`placement` reads from weights which of them a site has.
"""
