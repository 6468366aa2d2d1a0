"""The whole package on a toy, an FFN and a vocabulary head: `python -m examples.toy`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.random import normal

import hire_rewrite as hire

D, HIDDEN, VOCABULARY = 256, 1024, 16_384


def decode_step(params: Any, token: Array) -> Array:
    """Logits: [batch, VOCABULARY] for what follows token: i32[batch]."""
    x = params["embed"][token]
    x = x + jax.nn.gelu(x @ params["up"]) @ params["down"]
    return x @ params["head"]


def main() -> tuple[Array, Array]:
    """The logits of both, dense and rewritten: [4, VOCABULARY]."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embed": normal(keys[0], (VOCABULARY, D)),
        "up": normal(keys[1], (D, HIDDEN)) / D**0.5,
        "down": normal(keys[2], (HIDDEN, D)) / HIDDEN**0.5,
        "head": normal(keys[3], (D, VOCABULARY)) / D**0.5,
    }
    token = jnp.array([3, 1, 4, 15])

    # `force`, for a toy is too small to gain much: what would not be faster stays dense.
    ffn = hire.FFN(k=0.05, tail="predicted", encoding=hire.Blocks(8), force=True)
    step = hire.transform(decode_step, ffn, hire.Head(k=64, force=True))
    packed = step.pack(params, token)  # once for these weights
    print(step.plan(packed, token))  # what is rewritten, and what is read
    print(step.diff(packed, token))  # the graph before and after

    dense = jax.jit(decode_step)(params, token)
    rewritten = jax.jit(step)(packed, token)  # packed stands where params stood
    print("likeliest tokens:", dense.argmax(-1), "dense,", rewritten.argmax(-1), "rewritten")
    print(f"logits differ by at most {jnp.abs(dense - rewritten).max():.3f}")
    return dense, rewritten


if __name__ == "__main__":
    main()
