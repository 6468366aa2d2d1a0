"""FFN blocks: linear, something separate for each hidden neuron, linear.

`rule` is what a user asks for, `match` finds blocks (`activation` names what stands between the
products), `kind` says what the passes ask of a kind, `sizes` resolves a rule, `packing` lays out
the weights, `operation` has the modes (`experts` for blocks side by side, `exact` on weights as
they are), `cost` what it reads, `statistics` what calibration tells.
"""
