"""Vocabulary heads: a linear layer onto a large axis that only logits' consumers read.

`rule` is what a user asks for, `match` finds heads (`logits` follows the vocabulary to its
readers), `kind` says what the passes ask of a kind, `sizes` resolves a rule, `operation` has the
modes, `epilogue` the model's own code behind the logits, `top_k` what looks for the greatest.
"""
