"""The translation model: three functions over a plain dict of arrays.

    encode(config, params, ids, mask)            read sentences
    start(config, params, encoded, mask)         the state before the first word of the translations
    decode_step(config, params, token, state)    one more token per sentence

Bind the config once, then compile; the state may be donated:

    step = jax.jit(functools.partial(model.decode_step, config), donate_argnames="state")
    logits, state = step(params, token, state)

The encoder is a transformer, each layer

    x = norm(x + attention(x));  x = norm(x + ffn(x))

The decoder looks back at its own words through a recurrent cell (SSRU), not through attention, and
at the sentence through attention whose keys and values `start` computes once:

    x = norm(x + relu(cell));  x = norm(x + attention(x, sentence));  x = norm(x + ffn(x))
    cell = f · cell + (1 − f) · (x w),  f = sigmoid(x wf + bf)

FFNs are ReLU with biases. Positions enter as sines and cosines that are added to the embedding. The
head is the embedding, with a bias; as an embedding it is scaled by sqrt(d_model).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..layers import attend

Params = dict[str, Any]
State = dict[str, Any]

# Marian's.
_NORM_EPS = 1e-9
_POSITION_BASE = 10_000.0


@dataclass(frozen=True)
class Config:
    """Sizes of the model. Hashable, so it can also be a static argument of `jax.jit`."""

    vocab: int
    d_model: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


def encode(config: Config, params: Params, ids: Array, mask: Array) -> Array:
    """Read ids: i32[batch, source]; return [batch, source, d_model].

    mask: bool[batch, source] is true where a token is real, false where it is padding. A sentence
    has at least one real token, and its own result does not depend on the padding.
    """
    x = _embed(config, params["embed"][ids], jnp.arange(ids.shape[1]))
    for layer in params["encoder"]:
        k, v = _keys_values(config, layer["attn"], x)
        x = _attention(config, layer["attn"], x, k, v, mask)
        x = _ffn(layer["ffn"], x)
    return x


def start(config: Config, params: Params, encoded: Array, mask: Array) -> State:
    """The state before the first token.

    cells: a list with [batch, d_model] for each layer of the decoder
    keys: a list with [batch, heads, head_dim, source]
    values: a list with [batch, heads, source, head_dim]
    mask: bool[batch, source]
    pos: i32[], how many tokens were read; all translations advance together
    """
    both = [_keys_values(config, layer["attn"], encoded) for layer in params["decoder"]]
    return {
        "cells": [jnp.zeros_like(encoded[:, 0]) for _ in params["decoder"]],
        "keys": [k for k, _ in both],
        "values": [v for _, v in both],
        "mask": mask,
        "pos": jnp.int32(0),
    }


def decode_step(config: Config, params: Params, token: Array, state: State) -> tuple[Array, State]:
    """Read token: i32[batch]; return logits: [batch, vocab] for the next one, and the state.

    Before the first word there is none to read: the first call may be given any tokens.
    """
    word = jnp.where(state["pos"] > 0, params["embed"][token], 0)
    x = _embed(config, word, state["pos"])
    cells = []
    layers = zip(params["decoder"], state["cells"], state["keys"], state["values"], strict=True)
    for layer, cell, k, v in layers:
        x, cell = _ssru(layer["rnn"], x, cell)
        x = _attention(config, layer["attn"], x[:, None], k, v, state["mask"])[:, 0]
        x = _ffn(layer["ffn"], x)
        cells.append(cell)
    logits = x @ params["embed"].T + params["head_bias"]
    return logits, {**state, "cells": cells, "pos": state["pos"] + 1}


def _embed(config: Config, words: Array, position: Array) -> Array:
    """words: [..., d_model] at position: i32[] or i32[source]. Sines first, then cosines."""
    half = config.d_model // 2
    frequencies = _POSITION_BASE ** (-jnp.arange(half) / (half - 1))
    angle = position[..., None] * frequencies
    places = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return words * math.sqrt(config.d_model) + places.astype(words.dtype)


def _ssru(w: Params, x: Array, cell: Array) -> tuple[Array, Array]:
    """The recurrent layer of x: [b, d_model], and its cell after x."""
    forget = jax.nn.sigmoid(x @ w["wf"] + w["bf"])
    cell = forget * cell + (1 - forget) * (x @ w["w"])
    return _norm(w, x + jax.nn.relu(cell)), cell


def _keys_values(config: Config, w: Params, x: Array) -> tuple[Array, Array]:
    """Keys [b, heads, h, t] and values [b, heads, t, h] of x: [b, t, d_model]."""
    heads = (*x.shape[:2], config.heads, config.head_dim)
    k = (x @ w["wk"] + w["bk"]).reshape(heads)
    v = (x @ w["wv"] + w["bv"]).reshape(heads)
    return jnp.einsum("btkh->bkht", k), jnp.einsum("btkh->bkth", v)


def _attention(config: Config, w: Params, x: Array, k: Array, v: Array, mask: Array) -> Array:
    """The attention layer of x: [b, s, d_model], which looks where mask: bool[b, t] is true."""
    q = (x @ w["wq"] + w["bq"]).reshape(*x.shape[:2], config.heads, 1, config.head_dim)
    mixed = attend(jnp.einsum("bskgh->bkgsh", q), k, v, mask[:, None, None, None, :])
    return _norm(w, x + mixed @ w["wo"] + w["bo"])


def _ffn(w: Params, x: Array) -> Array:
    """The feed-forward layer of x: [..., d_model]."""
    hidden = jax.nn.relu(x @ w["w1"] + w["b1"])
    return _norm(w, x + hidden @ w["w2"] + w["b2"])


def _norm(w: Params, x: Array) -> Array:
    """Layer norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + _NORM_EPS)
    return y.astype(x.dtype) * w["norm_scale"] + w["norm_bias"]
