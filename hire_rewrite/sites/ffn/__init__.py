"""FFN blocks: linear, something separate for each hidden neuron, linear.

`rule` is what a user asks for, `match` finds blocks (`activation` names what stands between the
products), `kind` says what the passes ask of a kind, `sizes` resolves a rule and what calibration
told, `packing` lays out the weights, `operation` has the modes and what they read (`experts` for
blocks side by side, `exact` on weights as they are).
"""
