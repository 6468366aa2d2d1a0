"""Encoders and decoders built with Flax Linen: T5 in two versions and libraries, BERT."""

from __future__ import annotations

import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from tests.zoo.linen import CACHE, POSITIONS, TOKENS, D, F, G, V
from tests.zoo.linen_kit import RMSNorm, cache_of, filled, forward, params_of, scanned
from tests.zoo.model import Built, Model, ffn, head

HEADS = 4
STATES = jnp.sin(jnp.arange(6 * D, dtype=jnp.float32) ** 1.5).reshape(1, 6, D)


def buckets(position: jax.Array, both_ways: bool, count: int = 32, far: int = 128) -> jax.Array:
    """T5's buckets of distances: each its own when near, logarithmic when far."""
    found = jnp.zeros_like(position)
    if both_ways:
        count //= 2
        found = (position > 0) * count
        position = jnp.abs(position)
    else:
        position = -jnp.minimum(position, 0)
    near = count // 2
    large = jnp.log(jnp.maximum(position, 1) / near) / jnp.log(far / near) * (count - near)
    large = jnp.minimum(near + large.astype(jnp.int32), count - 1)
    return found + jnp.where(position < near, position, large)


class T5Attention(nn.Module):
    """Attention without scaling, to what came before or to an encoder's states."""

    dtype: Any
    biased: bool = False
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, states: jax.Array | None = None, bias: Any = None) -> Any:
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        source = x if states is None else states
        q, k, v = (dense(D, name=n)(y) for n, y in (("q", x), ("k", source), ("v", source)))
        q, k, v = (y.reshape(*y.shape[:2], HEADS, -1) for y in (q, k, v))
        start = 0
        if self.causal and self.has_variable("cache", "cached_key"):
            start, k, v = self._cached(k, v)
        elif self.causal and self.is_mutable_collection("cache"):
            self._cached(k, v)
        at = jnp.arange(x.shape[1])[:, None] + start
        if self.biased:
            distance = jnp.arange(k.shape[1])[None] - at
            init = nn.initializers.normal(D**-0.5)
            table = nn.Embed(32, HEADS, embedding_init=init, name="relative_attention_bias")
            bias = table(buckets(distance, not self.causal)).transpose((2, 0, 1))[None]
            if self.causal:
                bias += jnp.where(jnp.arange(k.shape[1]) <= at, 0, -1e10)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        probs = jax.nn.softmax(scores if bias is None else scores + bias).astype(self.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", probs, v).reshape(x.shape)
        return dense(D, name="o")(y), bias

    def _cached(self, k: jax.Array, v: jax.Array) -> Any:
        keys = self.variable("cache", "cached_key", jnp.zeros, k.shape, k.dtype)
        values = self.variable("cache", "cached_value", jnp.zeros, v.shape, v.dtype)
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        start = index.value
        if not self.is_initializing():
            keys.value = lax.dynamic_update_slice(keys.value, k, (0, start, 0, 0))
            values.value = lax.dynamic_update_slice(values.value, v, (0, start, 0, 0))
            index.value = start + k.shape[1]
        return start, keys.value, values.value


class T5FF(nn.Module):
    dtype: Any
    gated: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        if self.gated:
            hidden = nn.gelu(dense(G, name="wi_0")(x), approximate=True) * dense(G, name="wi_1")(x)
        else:
            hidden = nn.relu(dense(F, name="wi")(x))
        return dense(D, name="wo")(hidden)


class T5Block(nn.Module):
    dtype: Any
    gated: bool
    biased: bool
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array, bias: Any, states: jax.Array | None) -> Any:
        attention = T5Attention(self.dtype, self.biased, self.causal, name="SelfAttention")
        y, bias = attention(RMSNorm(name="layer_norm_0")(x), bias=bias)
        x = x + y
        if states is not None:
            attention = T5Attention(self.dtype, name="EncDecAttention")
            x = x + attention(RMSNorm(name="layer_norm_1")(x), states)[0]
        ff = T5FF(self.dtype, self.gated, name="DenseReluDense")
        return x + ff(RMSNorm(name="layer_norm_2")(x)), bias


class T5Stack(nn.Module):
    dtype: Any
    gated: bool
    causal: bool
    depth: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, states: jax.Array | None = None) -> jax.Array:
        bias = None
        for i in range(self.depth):
            block = T5Block(self.dtype, self.gated, i == 0, self.causal, name=f"block_{i}")
            x, bias = block(x, bias, states)
        return RMSNorm(name="final_layer_norm")(x)


class T5(nn.Module):
    """T5 1.0: ReLU, and logits from the shared embedding, scaled."""

    dtype: Any
    gated: ClassVar[bool] = False
    depth: ClassVar[int] = 1

    def setup(self) -> None:
        self.shared = nn.Embed(V, D, dtype=self.dtype)
        self.encoder = T5Stack(self.dtype, self.gated, causal=False)
        self.decoder = T5Stack(self.dtype, self.gated, causal=True, depth=self.depth)
        if self.gated:
            self.lm_head = nn.Dense(V, use_bias=False, dtype=self.dtype)

    def decode(self, tokens: jax.Array, states: jax.Array) -> jax.Array:
        x = self.decoder(self.shared(tokens), states)
        return self.lm_head(x) if self.gated else self.shared.attend(x * D**-0.5)

    def __call__(self, tokens: jax.Array, before: jax.Array) -> jax.Array:
        return self.decode(before, self.encoder(self.shared(tokens)))


class T5v11(T5):
    """T5 1.1: gated GELU and a head of its own."""

    gated = True
    depth = 2


def _t5_decode(dtype: Any) -> Built:
    model = T5v11(dtype)
    cache = filled(cache_of(model, CACHE, STATES.astype(dtype), method=model.decode), 4)

    def step(params: Any, token: jax.Array, states: jax.Array, cache: Any) -> Any:
        variables = {"params": params, "cache": cache}
        logits, new = model.apply(variables, token, states, method=model.decode, mutable=["cache"])
        return logits[:, -1], new["cache"]

    args = (jnp.array([[17]]), STATES.astype(dtype), cache)
    return Built(step, params_of(model, dtype, TOKENS, TOKENS), args)


class DenseGeneral(nn.Module):
    """As in T5X and MaxText: several output axes, one `dot_general`."""

    features: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=0)
        kernel = self.param("kernel", init, (x.shape[-1], *self.features))
        kernel = jnp.asarray(kernel, self.dtype)
        return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


class MlpBlock(nn.Module):
    dtype: Any
    activations: tuple[str, ...] = ("relu",)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = []
        for i, name in enumerate(self.activations):
            layer = "wi" if len(self.activations) == 1 else f"wi_{i}"
            y = DenseGeneral((F,), self.dtype, name=layer)(x)
            hidden.append(y if name == "linear" else getattr(nn, name)(y))
        y = functools.reduce(operator.mul, hidden)
        return DenseGeneral((D,), self.dtype, name="wo")(y)


class T5XLayer(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        y = RMSNorm(name="pre_attention_layer_norm")(x)
        q, k, v = (
            DenseGeneral((HEADS, D // HEADS), self.dtype, name=n)(y)
            for n in ("query", "key", "value")
        )
        y = nn.dot_product_attention(q, k, v, mask=mask, dtype=self.dtype)
        x = x + DenseGeneral((D,), self.dtype, name="out")(y.reshape(x.shape))
        return x + MlpBlock(self.dtype, name="mlp")(RMSNorm(name="pre_mlp_layer_norm")(x)), None


class T5X(nn.Module):
    """The decoder-only network: layers stacked along the second axis of each weight."""

    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(V, D, dtype=self.dtype, name="token_embedder")
        x = embed(tokens)
        x, _ = scanned(T5XLayer)(self.dtype, name="decoder")(x, nn.make_causal_mask(tokens))
        x = RMSNorm(name="decoder_norm")(x)
        return embed.attend(x) / jnp.sqrt(D).astype(self.dtype)


class BertLayer(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        q, k, v = (
            dense(D, name=n)(x).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value")
        )
        low = jnp.full_like(mask, -1e4).astype(self.dtype)
        bias = lax.select(mask > 0, jnp.zeros_like(low), low)
        y = nn.dot_product_attention(q, k, v, bias=bias[:, None, None], dtype=self.dtype)
        y = dense(D, name="attention_output")(y.reshape(x.shape))
        x = norm(name="attention_LayerNorm")(x + y)
        y = nn.gelu(dense(F, name="intermediate")(x), approximate=False)
        return norm(name="output_LayerNorm")(x + dense(D, name="output")(y))


class Bert(nn.Module):
    """Masked language model: a transform, the tied decoder, and a bias of its own."""

    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12, dtype=self.dtype)
        words = nn.Embed(V, D, dtype=self.dtype, name="word_embeddings")
        x = words(tokens)
        x += nn.Embed(CACHE, D, dtype=self.dtype, name="position_embeddings")(positions)
        kinds = jnp.zeros_like(tokens)
        x += nn.Embed(2, D, dtype=self.dtype, name="token_type_embeddings")(kinds)
        x = norm(name="LayerNorm")(x)
        for i in range(2):
            x = BertLayer(self.dtype, name=f"layer_{i}")(x, mask)
        x = nn.gelu(nn.Dense(D, dtype=self.dtype, name="transform")(x), approximate=False)
        x = norm(name="transform_LayerNorm")(x)
        kernel = words.variables["params"]["embedding"].T
        decoder = nn.Dense(V, use_bias=False, dtype=self.dtype, parent=None)
        x = decoder.apply({"params": {"kernel": kernel}}, x)
        bias = self.param("bias", nn.initializers.normal(0.02), (V,))
        return x + jnp.asarray(bias, self.dtype)


def _t5_ffn(stack: str, weights: str, *fields: Any, **more: Any) -> Any:
    return ffn(
        f"{stack}/{weights}/DenseReluDense:params/{weights}/DenseReluDense", D, *fields, **more
    )


MODELS = [
    Model("Linen", "T5 (relu, tied)", "forward", forward(T5, TOKENS, TOKENS[:, :4]), (
        _t5_ffn("T5", "encoder/block_0", F, "relu"),
        _t5_ffn("T5/T5.decode", "decoder/block_0", F, "relu"),
        head("T5/T5.decode/shared.attend:params/shared/embedding", D, V),
    ), linears=12),
    Model("Linen", "T5 1.1 (gated gelu)", "decode", _t5_decode, (
        *(_t5_ffn("T5v11.decode", f"decoder/block_{i}", G, "gelu_tanh", gated=True)
          for i in range(2)),
        head("T5v11.decode/lm_head:params/lm_head/kernel", D, V),
    ), linears=16),
    Model("Linen", "T5X (scanned axis 1, remat)", "forward", forward(T5X, TOKENS), (
        ffn("T5X/decoder/mlp:params/decoder/mlp", D, F, "relu", repeats=3),
        head("T5X/token_embedder.attend:params/token_embedder/embedding", D, V),
    ), linears=4),
    Model("Linen", "BERT (masked language model)", "forward",
          forward(Bert, TOKENS, POSITIONS, jnp.ones_like(TOKENS, jnp.float32)), (
        *(ffn(f"Bert/layer_{i}:params/layer_{i}/output/kernel", D, F, "gelu") for i in range(2)),
        head("Bert/Dense:params/word_embeddings/embedding", D, V),
    ), linears=9),
]  # fmt: skip
