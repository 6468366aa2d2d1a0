"""Models built with Haiku."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from tests.zoo.model import Built, Model, ffn, head

D, F, V, T = 32, 128, 256, 5


def _gpt2(dtype: Any) -> Built:
    def forward(tokens):
        embed = hk.Embed(V, D, name="wte")
        x = embed(tokens).astype(dtype)
        for i in range(2):
            h = hk.LayerNorm(-1, True, True, name=f"ln_{i}")(x)
            x = x + hk.Linear(D, name=f"c_proj_{i}")(jax.nn.gelu(hk.Linear(F, name=f"c_fc_{i}")(h)))
        return x @ embed.embeddings.T

    model = hk.without_apply_rng(hk.transform(forward))
    tokens = jnp.arange(T)[None]
    params = model.init(jax.random.key(0), tokens)
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    return Built(model.apply, params, (tokens,))


MODELS = [
    Model("Haiku", "GPT-2-like (draft)", "forward", _gpt2, (
        ffn("params/c_proj_0/w", D, F, "gelu_tanh"), ffn("params/c_proj_1/w", D, F, "gelu_tanh"),
        head("params/wte/embeddings", D, V),
    )),
]  # fmt: skip
