"""What is compiled for TPU: a decode step, a block and a head alone, and how they are rewritten."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import hire_rewrite as hire
from benchmarks.decode_1b import LENGTH, LLAMA_1B
from examples.smollm2 import model
from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.rules import Rule

BLOCK_PREDICTORS = (hire.LowRank(128), hire.Quantized(4))
HEAD = hire.Head(k=64, candidates=1024, predictor=hire.LowRank(256))


def selected(predictor: Predictor) -> hire.FFN:
    """The top 5 % of neurons alone."""
    return hire.FFN(k=0.05, candidates=0.10, predictor=predictor, force=True)


def everything(rows: Encoding, neurons: float, inputs: float) -> tuple[Rule, ...]:
    """All layers compressed, so many neurons and inputs of each token from rows of 8 bits."""
    exact = hire.Blocks(8, None, scale="bfloat16")
    block = hire.FFN(neurons, tail="predicted", encoding=rows, exact=exact, force=True)
    return block, hire.Linear(inputs, encoding=rows, exact=exact, force=True), HEAD


EIGHT, FOUR = hire.Blocks(8, None, scale="bfloat16"), hire.Blocks(4, scale="bfloat16")
RULES: dict[str, tuple[Rule, ...]] = {
    **{str(predictor): (selected(predictor), HEAD) for predictor in BLOCK_PREDICTORS},
    "LowRank(rank=128), attention in 4 bits": (
        selected(hire.LowRank(128)),
        hire.Linear(encoding=FOUR, force=True),
        HEAD,
    ),
    "8 bits, exact parts": everything(EIGHT, neurons=0.02, inputs=0.02),
    "4 bits, exact parts": everything(FOUR, neurons=0.05, inputs=0.05),
}
"""What is rewritten in the decode step, by name."""


def decode(shape: Callable[..., Any], batch: int, config: model.Config = LLAMA_1B) -> Any:
    """The decode step and its arguments, in bfloat16."""
    d, f, kv, n = config.d_model, config.d_ff, config.kv_heads * config.head_dim, config.layers
    layers = {
        "wq": shape(n, d, d),
        "wk": shape(n, d, kv),
        "wv": shape(n, d, kv),
        "wo": shape(n, d, d),
        "w_gate": shape(n, d, f),
        "w_up": shape(n, d, f),
        "w_down": shape(n, f, d),
        "attn_norm": shape(n, d),
        "ffn_norm": shape(n, d),
    }
    params = {"embed": shape(config.vocab, d), "layers": layers, "final_norm": shape(d)}
    cache = jax.eval_shape(lambda: model.init_cache(config, batch, LENGTH, jnp.bfloat16))
    cache = jax.tree.map(lambda array: shape(*array.shape, dtype=array.dtype), cache)
    args = (params, shape(batch, dtype=jnp.int32), cache)
    return functools.partial(model.decode_step, config), args


def block(shape: Callable[..., Any], batch: int) -> Any:
    """A gated block that is not one of a stack, and its arguments."""
    weights = {"gate": shape(2048, 8192), "up": shape(2048, 8192), "down": shape(8192, 2048)}

    def run(w: Any, x: Any) -> Any:
        return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

    return run, (weights, shape(batch, 2048))


def head(shape: Callable[..., Any], batch: int) -> Any:
    """A head that fits into VMEM, and its arguments."""
    return lambda w, x: x @ w.T, (shape(32_000, 1024), shape(batch, 1024))
