"""Rewrite JAX functions to HiRE's predict-then-gather form.

    import hire_rewrite as hire

    step = hire.transform(decode_step, hire.Head(k=64))
    print(step.plan(params, token, cache))
    packed = step.pack(params, token, cache, calibration=batches)
    logits, cache = step(packed, token, cache)

The way of the data: `trace → detect → plan → pack → rewrite → run`.
"""

from hire_rewrite.api import diff, inspect, transform
from hire_rewrite.errors import HireRewriteError, HireRewriteWarning
from hire_rewrite.ops.encodings import Blocks, Float, Nested
from hire_rewrite.ops.predictors import Cascade, LowRank, Quantized
from hire_rewrite.ops.top_k.da_top_k import da_top_k
from hire_rewrite.packed import Packed
from hire_rewrite.passes.diff import Diff
from hire_rewrite.plan import Layer, Plan, Rejection, Site
from hire_rewrite.report import ModelReport, Report, SiteReport
from hire_rewrite.saved import load_rules, save_rules
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.head.rule import Head
from hire_rewrite.sites.linear.rule import Linear
from hire_rewrite.telemetry import Telemetry
from hire_rewrite.tuned import Tuned

__version__ = "0.1.0.dev0"

__all__ = [
    "FFN",
    "Blocks",
    "Cascade",
    "Diff",
    "Float",
    "Head",
    "HireRewriteError",
    "HireRewriteWarning",
    "Layer",
    "Linear",
    "LowRank",
    "ModelReport",
    "Nested",
    "Packed",
    "Plan",
    "Quantized",
    "Rejection",
    "Report",
    "Site",
    "SiteReport",
    "Telemetry",
    "Tuned",
    "da_top_k",
    "diff",
    "inspect",
    "load_rules",
    "save_rules",
    "transform",
]
