"""A decoder in Equinox, dense and rewritten: `python -m examples.libraries.equinox_model`.

Modules are written for one sequence. Keys and values are in an `eqx.nn.State` that goes through
the model, and the arrays that `eqx.partition` takes out of it are the weights.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

import hire_rewrite as hire

from ..layers import rotate
from ..smollm2.generate import greedy
from .sizes import ROPE_BASE, SIZES, Sizes, published, report


class Attention(eqx.Module):
    """Attention of one token to those before it, which are in the state."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear
    cache: eqx.nn.StateIndex[Any]
    heads: int

    def __init__(self, sizes: Sizes, key: Array):
        self.query, self.key, self.value, self.out = (
            eqx.nn.Linear(sizes.d, sizes.d, use_bias=False, key=one)
            for one in jax.random.split(key, 4)
        )
        empty = jnp.zeros((sizes.max_len, sizes.heads, sizes.head_dim))
        self.cache = eqx.nn.StateIndex((empty, empty, jnp.int32(0)))
        self.heads = sizes.heads

    def __call__(self, x: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        keys, values, pos = state.get(self.cache)
        q, k, v = (
            layer(x).reshape(self.heads, 1, -1) for layer in (self.query, self.key, self.value)
        )
        q, k = (rotate(y, pos[None], ROPE_BASE) for y in (q, k))
        q, k, v = (y.swapaxes(0, 1) for y in (q, k, v))  # [1, heads, head_dim]
        keys = lax.dynamic_update_slice(keys, k, (pos, 0, 0))
        values = lax.dynamic_update_slice(values, v, (pos, 0, 0))
        seen = (jnp.arange(len(keys)) <= pos)[None, None]
        mixed = jax.nn.dot_product_attention(q, keys, values, mask=seen)
        return self.out(mixed.reshape(-1)), state.set(self.cache, (keys, values, pos + 1))


class Block(eqx.Module):
    attention_norm: eqx.nn.RMSNorm
    attention: Attention
    ffn_norm: eqx.nn.RMSNorm
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, sizes: Sizes, key: Array):
        keys = jax.random.split(key, 4)
        self.attention_norm, self.ffn_norm = eqx.nn.RMSNorm(sizes.d), eqx.nn.RMSNorm(sizes.d)
        self.attention = Attention(sizes, keys[0])
        self.gate = eqx.nn.Linear(sizes.d, sizes.hidden, use_bias=False, key=keys[1])
        self.up = eqx.nn.Linear(sizes.d, sizes.hidden, use_bias=False, key=keys[2])
        self.down = eqx.nn.Linear(sizes.hidden, sizes.d, use_bias=False, key=keys[3])

    def __call__(self, x: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        mixed, state = self.attention(self.attention_norm(x), state)
        y = self.ffn_norm(x + mixed)
        return x + mixed + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), state


class Decoder(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, sizes: Sizes, key: Array):
        first, last, *keys = jax.random.split(key, 2 + sizes.layers)
        self.embed = eqx.nn.Embedding(sizes.vocabulary, sizes.d, key=first)
        self.blocks = [Block(sizes, one) for one in keys]
        self.norm = eqx.nn.RMSNorm(sizes.d)
        self.head = eqx.nn.Linear(sizes.d, sizes.vocabulary, use_bias=False, key=last)

    def __call__(self, token: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        """Logits: [vocabulary] for the token after token: i32[]."""
        x = self.embed(token)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(self.norm(x)), state


def main(sizes: Sizes = SIZES, n: int = 20) -> tuple[hire.Plan, Array, Array]:
    """The plan, and the n tokens that each step chooses: i32[n], dense and rewritten."""
    model, empty = eqx.nn.make_with_state(Decoder)(sizes, jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    params, token = published(params), jnp.array(1)

    def decode_step(params: Any, token: Array, state: Any) -> tuple[Array, Any]:
        return eqx.combine(params, static)(token, state)

    step = hire.transform(decode_step)
    packed = step.pack(params, token, empty)
    plan = step.plan(packed, token, empty)

    tokens = []
    for function, weights in ((decode_step, params), (step, packed)):
        state = jax.tree.map(jnp.copy, empty)  # the step writes into it: it is donated
        compiled = jax.jit(function, donate_argnames="state")
        tokens.append(greedy(compiled, weights, state, token, n)[0])
    report(plan, *tokens)
    return plan, tokens[0], tokens[1]


if __name__ == "__main__":
    main()
