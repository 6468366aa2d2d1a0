"""Models built with Keras 3 on its JAX backend, called with `stateless_call`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import layers, ops

from tests.zoo.linen_kit import drawn
from tests.zoo.model import Built, Model, ffn, head

D, F, G, V, T, CACHE, HEADS = 32, 128, 96, 256, 5, 8, 4
TOKENS = jnp.arange(3, 3 + T)[None] * 7
IMAGE = jnp.sin(jnp.arange(16 * 16 * 3, dtype=jnp.float32) ** 1.5).reshape(1, 16, 16, 3)

# Compiling Keras' own initialisers takes ten seconds, and they differ in each process.
Conv2D, Dense, EinsumDense, MultiHeadAttention = (
    functools.partial(layer, kernel_initializer="zeros")
    for layer in (layers.Conv2D, layers.Dense, layers.EinsumDense, layers.MultiHeadAttention)
)
Embedding, ReversibleEmbedding = (
    functools.partial(layer, embeddings_initializer="zeros")
    for layer in (layers.Embedding, layers.ReversibleEmbedding)
)


def _build(make: Callable[[], keras.Model], *args: Any) -> Callable[[Any], Built]:
    """A model made under a policy of one dtype, with variables that are drawn anew."""

    def build(dtype: Any) -> Built:
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(jnp.dtype(dtype).name)
        cast = [a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in args]
        try:
            model = make()
            if not model.built:
                model(*(layers.Input(batch_shape=a.shape, dtype=a.dtype.name) for a in cast))
        finally:
            keras.config.set_dtype_policy(policy)
        named = [{v.name: jax.ShapeDtypeStruct(v.shape, dtype)} for v in model.trainable_variables]
        trainable = jax.tree.leaves(drawn(named, dtype))
        state = [variable.value for variable in model.non_trainable_variables]

        def fn(trainable: Any, *args: Any) -> Any:
            return model.stateless_call(trainable, state, *args)[0]

        return Built(fn, trainable, tuple(cast))

    return build


class TokenAndPositionEmbedding(layers.Layer):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.token_emb = Embedding(V, D, name="token_emb")
        self.pos_emb = Embedding(CACHE, D, name="pos_emb")

    def call(self, x: Any) -> Any:
        positions = ops.arange(0, ops.shape(x)[-1], 1)
        return self.token_emb(x) + self.pos_emb(positions)


class TransformerBlock(layers.Layer):
    """Norms behind, or before; masked or not."""

    def __init__(self, activation: Any, causal: bool, **kwargs: Any):
        super().__init__(**kwargs)
        self.causal = causal
        self.att = MultiHeadAttention(HEADS, D // HEADS, name="att")
        self.ffn = keras.Sequential(
            [
                Dense(F, activation=activation, name="intermediate"),
                Dense(D, name="output"),
            ],
            name="ffn",
        )
        self.layernorm1 = layers.LayerNormalization(epsilon=1e-6, name="layernorm1")
        self.layernorm2 = layers.LayerNormalization(epsilon=1e-6, name="layernorm2")
        self.dropout = layers.Dropout(0.1, name="dropout")

    def call(self, x: Any) -> Any:
        y = self.att(x, x, use_causal_mask=self.causal)
        x = self.layernorm1(x + self.dropout(y))
        return self.layernorm2(x + self.dropout(self.ffn(x)))


def _gpt() -> keras.Model:
    """The miniature GPT of Keras' examples."""
    inputs = layers.Input((T,), dtype="int32")
    x = TokenAndPositionEmbedding(name="embedding")(inputs)
    for i in range(2):
        x = TransformerBlock("relu", True, name=f"block_{i}")(x)
    return keras.Model(inputs, Dense(V, name="logits")(x), name="gpt")


def _bert() -> keras.Model:
    """A classifier: neither the pooled layer nor the three classes are an FFN or a vocabulary."""
    inputs = layers.Input((T,), dtype="int32")
    x = TokenAndPositionEmbedding(name="embedding")(inputs)
    for i in range(2):
        x = TransformerBlock("gelu", False, name=f"block_{i}")(x)
    x = Dense(D, activation="tanh", name="pooled_dense")(x[:, 0, :])
    x = layers.Dropout(0.1, name="classifier_dropout")(x)
    return keras.Model(inputs, Dense(3, name="classes")(x), name="bert")


class GemmaAttention(layers.Layer):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        size = D // HEADS
        self.query_dense = EinsumDense("btd,ndh->btnh", (None, HEADS, size), name="query")
        self.key_dense = EinsumDense("bsd,kdh->bskh", (None, 2, size), name="key")
        self.value_dense = EinsumDense("bsd,kdh->bskh", (None, 2, size), name="value")
        self.output_dense = EinsumDense("btnh,nhd->btd", (None, D), name="attention_output")
        self.softmax = layers.Softmax(dtype="float32", name="softmax")

    def rope(self, x: Any, start: Any) -> Any:
        half = ops.shape(x)[-1] // 2
        at = ops.cast(ops.arange(ops.shape(x)[1]) + start, "float32")
        angles = at[:, None] / 10_000 ** (ops.arange(half, dtype="float32") / half)
        angles = ops.expand_dims(ops.concatenate((angles, angles), axis=-1), axis=1)
        first, second = ops.split(x, 2, axis=-1)
        turned = ops.concatenate((-second, first), axis=-1)
        return ops.cast(x * ops.cos(angles) + turned * ops.sin(angles), x.dtype)

    def call(self, x: Any, cache: Any, index: Any) -> Any:
        q = self.rope(self.query_dense(x), index) * (D // HEADS) ** -0.5
        start = (0, index, 0, 0)
        k = ops.slice_update(cache[:, 0], start, self.rope(self.key_dense(x), index))
        v = ops.slice_update(cache[:, 1], start, self.value_dense(x))
        b, t, _, h = ops.shape(q)
        q = ops.reshape(q, (b, t, 2, HEADS // 2, h))
        logits = ops.einsum("btkgh,bskh->bkgts", q, k)
        mask = ops.arange(ops.shape(k)[1]) <= ops.expand_dims(ops.arange(t) + index, 1)
        probs = ops.cast(self.softmax(logits, mask=mask[None, None, None]), logits.dtype)
        y = ops.reshape(ops.einsum("bkgts,bskh->btkgh", probs, v), (b, t, HEADS, h))
        return self.output_dense(y), ops.stack((k, v), axis=1)


class GemmaBlock(layers.Layer):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.pre_attention_norm = layers.RMSNormalization(name="pre_attention_norm")
        self.attention = GemmaAttention(name="attention")
        self.pre_ffw_norm = layers.RMSNormalization(name="pre_ffw_norm")
        self.gating_ffw = EinsumDense("btd,df->btf", (None, G), name="ffw_gating")
        self.gating_ffw_2 = EinsumDense("btd,df->btf", (None, G), name="ffw_gating_2")
        self.ffw_linear = EinsumDense("btf,fd->btd", (None, D), name="ffw_linear")

    def call(self, x: Any, cache: Any, index: Any) -> Any:
        y, cache = self.attention(self.pre_attention_norm(x), cache, index)
        x = x + y
        y = self.pre_ffw_norm(x)
        x1, x2 = self.gating_ffw(y), self.gating_ffw_2(y)
        y = self.ffw_linear(keras.activations.gelu(x1, approximate=True) * x2)
        return x + y, cache


class Gemma(keras.Model):
    """A decode step; the caches of all layers are one array."""

    def __init__(self) -> None:
        super().__init__(name="gemma")
        self.token_embedding = ReversibleEmbedding(
            V, D, logit_soft_cap=30.0, name="token_embedding"
        )
        self.blocks = [GemmaBlock(name=f"decoder_block_{i}") for i in range(2)]
        self.norm = layers.RMSNormalization(name="final_normalization")

    def call(self, tokens: Any, cache: Any, index: Any) -> Any:
        x = self.token_embedding(tokens)
        x = x * ops.cast(ops.sqrt(D), x.dtype)
        caches = []
        for i, block in enumerate(self.blocks):
            x, new = block(x, cache[:, i], index)
            caches.append(new)
        logits = self.token_embedding(self.norm(x), reverse=True)
        return logits, ops.stack(caches, axis=1)


def _convnet() -> keras.Model:
    inputs = layers.Input((16, 16, 3))
    x = inputs
    for i, width in enumerate((8, 16)):
        x = Conv2D(width, 3, activation="relu", name=f"conv_{i}")(x)
        x = layers.MaxPooling2D(2, name=f"pool_{i}")(x)
    x = layers.Dropout(0.5, name="dropout")(layers.Flatten(name="flatten")(x))
    return keras.Model(inputs, Dense(10, activation="softmax", name="classes")(x))


_STATES = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, 2, CACHE, 2, D // HEADS)))

MODELS = [
    Model("Keras", "GPT", "forward", _build(_gpt, TOKENS), (
        *(ffn(f"block_{i}/ffn:trainable/{12 + 16 * i}", D, F, "relu") for i in range(2)),
        head("logits:trainable/34", D, V),
    ), linears=8),
    Model("Keras", "BERT classifier", "forward", _build(_bert, TOKENS), (
        *(ffn(f"block_{i}/ffn:trainable/{12 + 16 * i}", D, F, "gelu") for i in range(2)),
    ), linears=10),
    Model("Keras", "Gemma", "decode", _build(Gemma, TOKENS[:, :1], _STATES, jnp.int32(4)), (
        *(ffn(f"decoder_block_{i}:trainable/{9 + 9 * i}", D, G, "gelu_tanh", gated=True)
          for i in range(2)),
        head("token_embedding:trainable/0", D, V),
    ), linears=8),
    Model("Keras", "convnet", "forward", _build(_convnet, IMAGE), linears=1),
]  # fmt: skip
