"""Vocabulary heads: a linear layer onto a large axis that only logits' consumers read.

`rule` is what a user asks for, `match` finds heads (`logits` follows the vocabulary to its
readers, `distortion` tells what is not done to logits), `kind` says what the passes ask of a kind,
`sizes` resolves a rule, `operation` has the modes and what they read, `epilogue` the model's own
code behind the logits.
"""
