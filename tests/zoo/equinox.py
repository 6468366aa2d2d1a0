"""Models built with Equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from tests.zoo.model import Built, Model, ffn, head

__all__ = ["MODELS", "batched"]

D, F, GATED, V, T = 32, 128, 96, 256, 6
HEADS = 4


class GPTBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        k1, k2 = jr.split(key)
        self.norm1 = eqx.nn.LayerNorm(D)
        self.norm2 = eqx.nn.LayerNorm(D)
        self.attention = eqx.nn.MultiheadAttention(HEADS, D, use_output_bias=True, key=k1)
        self.mlp = eqx.nn.MLP(D, D, F, depth=1, activation=jax.nn.gelu, key=k2)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class GPT(eqx.Module):
    """A function of one sequence; the tied weight is a shared node."""

    shared: eqx.nn.Shared
    wpe: eqx.nn.Embedding
    blocks: list[GPTBlock]
    norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array):
        k1, k2, k3, *keys = jr.split(key, 5)
        wte = eqx.nn.Embedding(V, D, key=k1)
        lm_head = eqx.nn.Linear(D, V, use_bias=False, key=k2)
        self.shared = eqx.nn.Shared(
            (wte, lm_head), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight
        )
        self.wpe = eqx.nn.Embedding(8, D, key=k3)
        self.blocks = [GPTBlock(one) for one in keys]
        self.norm = eqx.nn.LayerNorm(D)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        wte, lm_head = self.shared()
        x = jax.vmap(wte)(tokens) + jax.vmap(self.wpe)(jnp.arange(len(tokens)))
        for block in self.blocks:
            x = block(x)
        return jax.vmap(lm_head)(jax.vmap(self.norm)(x))


class RMSNorm(eqx.Module):
    weight: jax.Array

    def __init__(self) -> None:
        self.weight = jnp.ones(D)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2) + 1e-5)
        return self.weight * wide.astype(x.dtype)


class LlamaBlock(eqx.Module):
    attention_norm: RMSNorm
    ffn_norm: RMSNorm
    attention: eqx.nn.MultiheadAttention
    rope: eqx.nn.RotaryPositionalEmbedding
    w1: eqx.nn.Linear
    w2: eqx.nn.Linear
    w3: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jr.split(key, 4)
        self.attention_norm, self.ffn_norm = RMSNorm(), RMSNorm()
        self.attention = eqx.nn.MultiheadAttention(HEADS, D, key=keys[0])
        self.rope = eqx.nn.RotaryPositionalEmbedding(D // HEADS)
        self.w1 = eqx.nn.Linear(D, GATED, use_bias=False, key=keys[1])
        self.w2 = eqx.nn.Linear(GATED, D, use_bias=False, key=keys[2])
        self.w3 = eqx.nn.Linear(D, GATED, use_bias=False, key=keys[3])

    def _rotate(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        turn = jax.vmap(self.rope, in_axes=1, out_axes=1)
        return turn(q).astype(q.dtype), turn(k).astype(k.dtype), v

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        h = self.ffn_norm(x)
        return x + self.w2(jax.nn.silu(self.w1(h)) * self.w3(h))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.vmap(self.attention_norm)(x)
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = x + self.attention(h, h, h, mask=mask, process_heads=self._rotate)
        return jax.vmap(self._feed_forward)(x)


class Llama(eqx.Module):
    """The layers are made by `filter_vmap`, their weights stacked, and run by a scan."""

    embed: eqx.nn.Embedding
    blocks: LlamaBlock
    norm: RMSNorm
    output: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        k1, k2, k3 = jr.split(key, 3)
        self.embed = eqx.nn.Embedding(V, D, key=k1)
        self.blocks = eqx.filter_vmap(LlamaBlock)(jr.split(k2, 3))
        self.norm = RMSNorm()
        self.output = eqx.nn.Linear(D, V, use_bias=False, key=k3)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(tokens)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        @eqx.filter_checkpoint
        def layer(x, one):
            return eqx.combine(one, static)(x), None

        x, _ = jax.lax.scan(layer, x, arrays)
        return jax.vmap(lambda row: self.output(self.norm(row)))(x)


class BertFFN(eqx.Module):
    mlp: eqx.nn.Linear
    output: eqx.nn.Linear
    layernorm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key: jax.Array):
        k1, k2 = jr.split(key)
        self.mlp = eqx.nn.Linear(D, F, key=k1)
        self.output = eqx.nn.Linear(F, D, key=k2)
        self.layernorm = eqx.nn.LayerNorm(D)
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x: jax.Array, inference: bool, key: jax.Array) -> jax.Array:
        h = self.dropout(self.output(jax.nn.gelu(self.mlp(x))), inference=inference, key=key)
        return self.layernorm(h + x)


class BertLayer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    layernorm: eqx.nn.LayerNorm
    ff_block: BertFFN

    def __init__(self, key: jax.Array):
        k1, k2 = jr.split(key)
        bias = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(HEADS, D, dropout_p=0.1, **bias, key=k1)
        self.layernorm = eqx.nn.LayerNorm(D)
        self.ff_block = BertFFN(k2)

    def __call__(self, x: jax.Array, mask: jax.Array, inference: bool, key: jax.Array) -> jax.Array:
        k1, k2 = jr.split(key)
        pairs = jnp.repeat((mask[:, None] * mask)[None], HEADS, axis=0).astype(jnp.float32)
        h = self.attention(x, x, x, mask=pairs, inference=inference, key=k1)
        x = jax.vmap(self.layernorm)(h + x)
        return jax.vmap(self.ff_block, in_axes=(0, None, 0))(x, inference, jr.split(k2, len(x)))


class BertMLM(eqx.Module):
    """The encoder of Equinox's example with the head that BERT is trained with."""

    token_embedder: eqx.nn.Embedding
    position_embedder: eqx.nn.Embedding
    layernorm: eqx.nn.LayerNorm
    layers: list[BertLayer]
    transform: eqx.nn.Linear
    transform_norm: eqx.nn.LayerNorm
    bias: jax.Array

    def __init__(self, key: jax.Array):
        k1, k2, k3, *keys = jr.split(key, 5)
        self.token_embedder = eqx.nn.Embedding(V, D, key=k1)
        self.position_embedder = eqx.nn.Embedding(8, D, key=k2)
        self.layernorm, self.transform_norm = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)
        self.layers = [BertLayer(one) for one in keys]
        self.transform = eqx.nn.Linear(D, D, key=k3)
        self.bias = 0.1 * jr.normal(k3, (V,))

    def __call__(self, tokens: jax.Array, inference: bool, key: jax.Array) -> jax.Array:
        x = jax.vmap(self.token_embedder)(tokens)
        x = jax.vmap(self.layernorm)(x + jax.vmap(self.position_embedder)(jnp.arange(len(tokens))))
        mask = jnp.asarray(tokens != 0, jnp.int32)
        for layer in self.layers:
            key, one = jr.split(key)
            x = layer(x, mask, inference, one)
        h = jax.vmap(self.transform_norm)(jax.nn.gelu(jax.vmap(self.transform)(x)))
        return h @ self.token_embedder.weight.T + self.bias


def split(model: eqx.Module, dtype: Any) -> tuple[Any, Any]:
    def cast(leaf):
        return leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf

    return eqx.partition(jax.tree.map(cast, model), eqx.is_array)


def batched(make: Callable[..., eqx.Module], *shape: int) -> Callable[[Any], Built]:
    """Modules treat one example; a batch of them is `vmap`'s."""

    def build(dtype: Any) -> Built:
        params, static = split(make(jr.key(0)), dtype)
        args = (
            (jr.normal(jr.key(1), (2, *shape), dtype),)
            if shape
            else (jr.randint(jr.key(1), (2, T), 1, V),)
        )
        return Built(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, args)

    return build


def _bert(dtype: Any) -> Built:
    params, static = split(BertMLM(jr.key(0)), dtype)

    def evaluate(params, tokens, key):
        model = eqx.combine(params, static)
        keys = jr.split(key, len(tokens))
        return jax.vmap(model, in_axes=(0, None, 0))(tokens, True, keys)

    tokens = jr.randint(jr.key(1), (2, T), 1, V).at[0, -1].set(0)
    return Built(evaluate, params, (tokens, jr.key(2)))


def _generate(dtype: Any) -> Built:
    """No cache: each step runs the whole window, as small demonstrations do."""
    params, static = split(GPT(jr.key(0)), dtype)

    @eqx.filter_jit
    def sample(model, tokens, position, key):
        logits = model(tokens)[position - 1] / 0.8
        return jr.categorical(key, logits)

    def generate(params, tokens, key):
        model = eqx.combine(params, static)

        def step(i, tokens):
            token = sample(model, tokens, i, jr.fold_in(key, i))
            return tokens.at[i].set(token.astype(tokens.dtype))

        return jax.lax.fori_loop(3, 6, step, tokens)

    tokens = jnp.zeros(T, jnp.int32).at[:3].set(jnp.array([5, 17, 99]))
    return Built(generate, params, (tokens, jr.key(2)))


_MLP = "eqx.nn.MLP/eqx.nn.Linear"
_GPT = "eqx.nn.Linear:params/shared/pytree/0/weight"

MODELS = [
    Model("Equinox", "GPT", "forward", batched(GPT), (
        *(ffn(f"{_MLP}:params/blocks/{i}/mlp/layers/1/weight", D, F, "gelu_tanh") for i in (0, 1)),
        head(_GPT, D, V),
    ), linears=8),
    Model("Equinox", "GPT", "generate", _generate, (
        *(ffn(f"{_MLP}:params/blocks/{i}/mlp/layers/1/weight", D, F, "gelu_tanh", repeats=3)
          for i in (0, 1)),
        head(_GPT, D, V, repeats=3),
    ), discrete=True, linears=8),
    Model("Equinox", "Llama, layers under lax.scan", "forward", batched(Llama), (
        ffn("eqx.nn.Linear:params/blocks/w2/weight", D, GATED, "silu", gated=True, repeats=3),
        head("eqx.nn.Linear:params/output/weight", D, V),
    ), linears=4),
    Model("Equinox", "BERT with its masked-token head", "forward", _bert, (
        *(ffn(f"eqx.nn.Linear:params/layers/{i}/ff_block/output/weight", D, F, "gelu_tanh")
          for i in (0, 1)),
        head("params/token_embedder/weight", D, V),
    ), linears=9),
]  # fmt: skip
