"""A decoder in Flax NNX, dense and rewritten: `python -m examples.libraries.nnx_model`.

Its modules hold weights as `nnx.Param`, and keys and values as `nnx.Cache`. `nnx.split` takes both
out of the model, so that a decode step is a function of them. Embedding and head are tied.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

import hire_rewrite as hire

from ..layers import rotate
from ..smollm2.generate import greedy
from .sizes import ROPE_BASE, SIZES, Sizes, published, report


class Attention(nnx.Module):
    """Attention of one token of each sequence to those before it, which are in the cache."""

    def __init__(self, sizes: Sizes, batch: int, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, sizes.d, sizes.d, use_bias=False, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear() for _ in range(4))
        shape = (batch, sizes.max_len, sizes.heads, sizes.head_dim)
        self.keys, self.values = nnx.Cache(jnp.zeros(shape)), nnx.Cache(jnp.zeros(shape))
        self.pos = nnx.Cache(jnp.int32(0))

    def __call__(self, x: Array) -> Array:
        batch, max_len, heads, head_dim = self.keys.shape
        pos = self.pos[...]
        q, k, v = (
            layer(x).reshape(batch, heads, 1, head_dim)
            for layer in (self.query, self.key, self.value)
        )
        q, k = (rotate(y, pos[None], ROPE_BASE) for y in (q, k))
        q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))  # [batch, 1, heads, head_dim]
        self.keys[...] = lax.dynamic_update_slice(self.keys[...], k, (0, pos, 0, 0))
        self.values[...] = lax.dynamic_update_slice(self.values[...], v, (0, pos, 0, 0))
        self.pos[...] = pos + 1
        seen = (jnp.arange(max_len) <= pos)[None, None, None]
        mixed = jax.nn.dot_product_attention(q, self.keys[...], self.values[...], mask=seen)
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, sizes: Sizes, batch: int, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(sizes.d, rngs=rngs)
        self.attention = Attention(sizes, batch, rngs)
        self.ffn_norm = nnx.RMSNorm(sizes.d, rngs=rngs)
        self.gate, self.up = linear(sizes.d, sizes.hidden), linear(sizes.d, sizes.hidden)
        self.down = linear(sizes.hidden, sizes.d)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        y = self.ffn_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    def __init__(self, sizes: Sizes, batch: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(sizes.vocabulary, sizes.d, rngs=rngs)
        self.blocks = nnx.List([Block(sizes, batch, rngs) for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.d, rngs=rngs)

    def __call__(self, token: Array) -> Array:
        """Logits: [batch, vocabulary] for the token after token: i32[batch]."""
        x = self.embed(token)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def main(sizes: Sizes = SIZES, n: int = 20) -> tuple[hire.Plan, Array, Array]:
    """The plan, and the n tokens that each step chooses: i32[2, n], dense and rewritten."""
    token = jnp.array([1, 2])
    model = Decoder(sizes, 2, nnx.Rngs(0))
    graph, params, empty = nnx.split(model, nnx.Param, nnx.Cache)  # type: ignore[misc]
    params = published(params)

    def decode_step(params: Any, token: Array, cache: Any) -> tuple[Array, Any]:
        model = nnx.merge(graph, params, cache)
        logits = model(token)
        return logits, nnx.state(model, nnx.Cache)

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
