"""A decoder in Flax Linen, dense and rewritten: `python -m examples.libraries.linen_model`.

Linen's own attention keeps keys and values in the collection "cache", which `apply` gives back with
`mutable=["cache"]`. Positions are learned, and the head is a layer of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import hire_rewrite as hire

from ..smollm2.generate import greedy
from .sizes import SIZES, Sizes, published, report


class Positions(nn.Module):
    """Adds what was learned of each position; the cache counts those that were read."""

    max_len: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        table = nn.Embed(self.max_len, x.shape[-1], name="table")
        decoding = self.has_variable("cache", "index")
        index = self.variable("cache", "index", lambda: jnp.int32(0))
        positions = index.value + jnp.arange(x.shape[1])
        if decoding:
            index.value = index.value + x.shape[1]
        return x + table(positions)


class Block(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        attention = nn.MultiHeadDotProductAttention(
            self.sizes.heads, use_bias=False, decode=True, name="attention"
        )
        x = x + attention(nn.RMSNorm()(x))
        y = nn.RMSNorm()(x)
        gate = nn.Dense(self.sizes.hidden, use_bias=False, name="gate")(y)
        up = nn.Dense(self.sizes.hidden, use_bias=False, name="up")(y)
        return x + nn.Dense(self.sizes.d, use_bias=False, name="down")(nn.silu(gate) * up)


class Decoder(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Logits: [batch, vocabulary] after the last of tokens: i32[batch, seq]."""
        x = nn.Embed(self.sizes.vocabulary, self.sizes.d, name="embed")(tokens)
        x = Positions(self.sizes.max_len, name="positions")(x)
        for i in range(self.sizes.layers):
            x = Block(self.sizes, name=f"block_{i}")(x)
        x = nn.RMSNorm(name="norm")(x[:, -1])
        return nn.Dense(self.sizes.vocabulary, use_bias=False, name="head")(x)


def main(sizes: Sizes = SIZES, n: int = 20) -> tuple[hire.Plan, Array, Array]:
    """The plan, and the n tokens that each step chooses: i32[2, n], dense and rewritten."""
    model, token = Decoder(sizes), jnp.array([1, 2])
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, sizes.max_len), jnp.int32))
    params, empty = published(variables["params"]), variables["cache"]

    def decode_step(params: Any, token: Array, cache: Any) -> tuple[Array, Any]:
        variables = {"params": params, "cache": cache}
        logits, updated = model.apply(variables, token[:, None], mutable=["cache"])
        return logits, updated["cache"]

    step = hire.transform(decode_step)
    packed = step.pack(params, token, empty)
    plan = step.plan(packed, token, empty)

    tokens = []
    for function, weights in ((decode_step, params), (step, packed)):
        cache = jax.tree.map(jnp.copy, empty)  # the step writes into it: it is donated
        compiled = jax.jit(function, donate_argnames="cache")
        tokens.append(greedy(compiled, weights, cache, token, n)[0])
    report(plan, *tokens)
    return plan, tokens[0], tokens[1]


if __name__ == "__main__":
    main()
