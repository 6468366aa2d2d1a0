"""Models built with Flax NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Built, Model, ffn, head

__all__ = ["HEAD", "MODELS", "Layer", "qwen3", "swiglu"]

D, F, V, T, S = 32, 96, 256, 4, 8
HEADS, KV, H = 4, 2, 8


def _rope(x: jax.Array, positions: jax.Array, theta: float = 1e4) -> jax.Array:
    """Rotates halves of [batch, tokens, heads, size] by angles computed in f32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.einsum("bt,k->btk", positions, frequency, precision="highest")[:, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class LayerCache(nnx.Module):
    def __init__(self, batch: int, dtype: Any):
        self.k = nnx.Cache(jnp.zeros((batch, S, KV, H), dtype))
        self.v = nnx.Cache(jnp.zeros((batch, S, KV, H), dtype))
        self.index = nnx.Variable(jnp.zeros((), jnp.int32))


class Attention(nnx.Module):
    """Grouped queries, norms of queries and keys, as Qwen 3 and Gemma 3 have them."""

    def __init__(self, norm: Callable[..., Any], *, dtype: Any, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.q_proj = nnx.Einsum("BTD,DNH->BTNH", (D, HEADS, H), **kw)
        self.k_proj = nnx.Einsum("BSD,DKH->BSKH", (D, KV, H), **kw)
        self.v_proj = nnx.Einsum("BSD,DKH->BSKH", (D, KV, H), **kw)
        self.o_proj = nnx.Einsum("BTNH,NHD->BTD", (HEADS, H, D), **kw)
        self.q_norm = norm(H, **kw)
        self.k_norm = norm(H, **kw)

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, cache: LayerCache | None) -> jax.Array:
        b, t, _ = x.shape
        start = cache.index[...] if cache is not None else 0
        positions = jnp.broadcast_to(start + jnp.arange(t), (b, t))
        q = _rope(self.q_norm(self.q_proj(x)), positions) * H**-0.5
        k = _rope(self.k_norm(self.k_proj(x)), positions)
        v = self.v_proj(x)
        if cache is not None:
            at = (0, start, 0, 0)
            k = jax.lax.dynamic_update_slice(cache.k[...], k, at)
            v = jax.lax.dynamic_update_slice(cache.v[...], v, at)
            cache.k[...], cache.v[...], cache.index[...] = k, v, start + t
        q = q.reshape(b, t, KV, HEADS // KV, H)
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", q, k).astype(jnp.float32)
        seen = jnp.arange(k.shape[1]) <= positions[..., None]
        logits = jnp.where(seen[:, :, None, None], logits, -2.3819763e38)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("BTKGS,BSKH->BTKGH", weights, v)
        return self.o_proj(mixed.reshape(b, t, HEADS, H))


class MLP(nnx.Module):
    def __init__(self, activation: Callable[..., Any], *, dtype: Any, rngs: nnx.Rngs):
        kw = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.gate_proj = nnx.Linear(D, F, **kw)
        self.up_proj = nnx.Linear(D, F, **kw)
        self.down_proj = nnx.Linear(F, D, **kw)
        self.activation = activation

    @jax.named_scope("feed_forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, mlp: nnx.Module, *, dtype: Any, rngs: nnx.Rngs):
        kw = {"epsilon": 1e-6, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.input_layernorm = nnx.RMSNorm(D, **kw)
        self.attn = Attention(nnx.RMSNorm, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(D, **kw)
        self.mlp = mlp

    def __call__(self, x: jax.Array, cache: LayerCache | None = None) -> jax.Array:
        x = x + self.attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nnx.Module):
    def __init__(self, mlp: Callable[..., nnx.Module], *, dtype: Any, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embedder = nnx.Embed(V, D, **kw)
        self.layers = nnx.List(
            [Layer(mlp(dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs) for _ in range(2)]
        )
        self.final_norm = nnx.RMSNorm(D, **kw)
        self.lm_head = nnx.Einsum("BTD,DV->BTV", (D, V), **kw)

    def __call__(self, tokens: jax.Array, cache: Any = (None, None)) -> jax.Array:
        x = self.embedder.embedding[...].at[(tokens,)].get()
        for layer, one in zip(self.layers, cache, strict=True):
            x = layer(x, one)
        return self.lm_head(self.final_norm(x))


def swiglu(**kw: Any) -> nnx.Module:
    return MLP(nnx.silu, **kw)


def qwen3(dtype: Any, form: str = "forward", mlp: Callable[..., nnx.Module] = swiglu) -> Built:
    graph, state = nnx.split(Qwen3(mlp, dtype=dtype, rngs=nnx.Rngs(0)))
    tokens = jnp.arange(1, 1 + T)[None]
    empty_graph, empty = nnx.split(nnx.List([LayerCache(1, dtype) for _ in range(2)]))

    def forward(state, tokens):
        return nnx.merge(graph, state)(tokens)

    def decode(state, tokens, cache):
        caches = nnx.merge(empty_graph, cache, copy=True)
        logits = nnx.merge(graph, state)(tokens, caches)
        return logits[:, -1], nnx.state(caches)

    def generate(state, tokens):
        def step(carry, _):
            token, cache = carry
            logits, cache = decode(state, token, cache)
            token = jnp.argmax(logits, -1)[:, None]
            return (token, cache), token[:, 0]

        logits, cache = decode(state, tokens, empty)
        first = jnp.argmax(logits, -1)[:, None]
        _, rest = jax.lax.scan(step, (first, cache), length=3)
        return jnp.concatenate([first, rest.T], axis=1)

    if form == "generate":
        return Built(generate, state, (tokens,))
    if form == "decode":
        _, cache = jax.jit(decode)(state, tokens, empty)
        return Built(decode, state, (tokens[:, :1], cache))
    return Built(forward, state, (tokens,))


class GemmaNorm(nnx.Module):
    """The scale is stored less one."""

    def __init__(self, size: int, *, dtype: Any, param_dtype: Any = None, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (size,), dtype))

    @jax.named_scope("rms_norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean + 1e-6) * (1 + self.scale[...])).astype(x.dtype)


class GemmaBlock(nnx.Module):
    def __init__(self, *, dtype: Any, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.pre_attention_norm = GemmaNorm(D, **kw)
        self.attn = Attention(GemmaNorm, **kw)
        self.post_attention_norm = GemmaNorm(D, **kw)
        self.pre_ffw_norm = GemmaNorm(D, **kw)
        self.mlp = MLP(nnx.gelu, **kw)
        self.post_ffw_norm = GemmaNorm(D, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.post_attention_norm(self.attn(self.pre_attention_norm(x), None))
        return x + self.post_ffw_norm(self.mlp(self.pre_ffw_norm(x)))


class Embedder(nnx.Module):
    def __init__(self, *, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.3)
        self.input_embedding = nnx.Param(init(rngs.params(), (V, D), dtype))

    @jax.named_scope("embedder_encode")
    def encode(self, tokens: jax.Array) -> jax.Array:
        x = self.input_embedding[(tokens,)]
        return x * jnp.sqrt(x.shape[-1]).astype(x.dtype)

    @jax.named_scope("embedder_decode")
    def decode(self, x: jax.Array) -> jax.Array:
        return jnp.dot(x, self.input_embedding[...].T)


class Gemma3(nnx.Module):
    def __init__(self, *, dtype: Any, rngs: nnx.Rngs):
        self.embedder = Embedder(dtype=dtype, rngs=rngs)
        self.layers = nnx.List([GemmaBlock(dtype=dtype, rngs=rngs) for _ in range(2)])
        self.final_norm = GemmaNorm(D, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedder.encode(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.embedder.decode(self.final_norm(x))
        return jnp.tanh(logits / 30.0) * 30.0


def _gemma3(dtype: Any) -> Built:
    graph, state = nnx.split(Gemma3(dtype=dtype, rngs=nnx.Rngs(0)))
    return Built(
        lambda state, tokens: nnx.merge(graph, state)(tokens), state, (jnp.arange(T)[None],)
    )


_LM_HEAD = "state/lm_head/kernel/value"
HEAD = head(_LM_HEAD, D, V)
_FFNS = tuple(ffn(f"feed_forward:state/layers/{i}/mlp", D, F, "silu", gated=True) for i in (0, 1))

MODELS = [
    Model("NNX", "Qwen3", "forward", qwen3, (*_FFNS, HEAD), linears=8),
    Model("NNX", "Qwen3", "decode", lambda dtype: qwen3(dtype, "decode"), (*_FFNS, HEAD),
          linears=8),
    Model("NNX", "Qwen3", "generate", lambda dtype: qwen3(dtype, "generate"), (
        *(ffn(f"feed_forward:state/layers/{i}/mlp#{n}", D, F, "silu", gated=True, repeats=r)
          for i in (0, 1) for n, r in ((1, 1), (2, 3))),
        *(head(f"{_LM_HEAD}#{n}", D, V, repeats=r) for n, r in ((1, 1), (2, 3))),
    ), discrete=True, linears=16),
    Model("NNX", "Gemma 3", "forward", _gemma3, (
        *(ffn(f"feed_forward:state/layers/{i}/mlp", D, F, "gelu_tanh", gated=True) for i in (0, 1)),
        head("embedder_decode:state/embedder/input_embedding/value", D, V),
    ), linears=8),
]  # fmt: skip
