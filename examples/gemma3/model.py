"""The Gemma 3 transformer: three functions over a plain dict of arrays.

    prefill(config, params, tokens, cache)      read a prompt, remember its keys and values
    decode_step(config, params, token, cache)   one more token per sequence
    forward(config, params, tokens)             logits at every position, no cache

They are called as those of `examples.smollm2.model`. Each layer is

    x += norm(attention(norm(x)));  x += norm(ffn(norm(x)))

with four norms of its own, and a fifth and a sixth on every query and key head. Most layers are
local: a token sees the `window` tokens up to itself. Every `global_every`th layer sees all of them,
and turns its queries and keys more slowly (RoPE with a greater base). All layers are stacked on a
leading axis and run under one `lax.scan`, which reads of each layer whether it is global. The head
is the embedding; as an embedding it is scaled by sqrt(d_model).

Letters in the einsums: b batch, s query position, k key-value head, g query head within its group,
h element of a head.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..layers import Cache, attend, attend_cache, init_cache, remember, rms_norm, rotate

Params = dict[str, Any]

__all__ = ["Cache", "Config", "Params", "decode_step", "forward", "init_cache", "prefill"]


@dataclass(frozen=True)
class Config:
    """Sizes of the model. Hashable, so it can also be a static argument of `jax.jit`."""

    vocab: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    global_every: int
    local_rope_base: float
    global_rope_base: float
    norm_eps: float

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def is_global(self) -> Array:
        """bool[layers]: which layers see all tokens."""
        return (jnp.arange(self.layers) + 1) % self.global_every == 0


def prefill(
    config: Config, params: Params, tokens: Array, cache: Cache, length: Array | int | None = None
) -> tuple[Array, Cache]:
    """Read tokens: i32[batch, seq]; return logits: [batch, vocab] after the last, and the cache.

    Prompts of many lengths compile once when padded on the right to one `seq`; `length` is then
    the number of real tokens. Padding leaves no trace: causal masking hides it from the real
    tokens, and later ones overwrite it. `pos + seq` must not exceed the cache's `max_len`.
    """
    n = tokens.shape[1] if length is None else length
    x, cache = _read(config, params, tokens, cache, n)
    last = lax.dynamic_index_in_dim(x, n - 1, axis=1, keepdims=False)
    return last @ params["embed"].T, cache


def decode_step(config: Config, params: Params, token: Array, cache: Cache) -> tuple[Array, Cache]:
    """Read token: i32[batch]; return logits: [batch, vocab] for the next one, and the cache."""
    x, cache = _read(config, params, token[:, None], cache, 1)
    return x[:, 0] @ params["embed"].T, cache


def forward(config: Config, params: Params, tokens: Array) -> Array:
    """Logits: [batch, seq, vocab] at every position of tokens: i32[batch, seq]."""
    positions = jnp.arange(tokens.shape[1])

    def block(x: Array, scanned: tuple[Params, Array]) -> tuple[Array, None]:
        layer, is_global = scanned
        q, k, v = _qkv(config, layer, x, positions, is_global)
        attended = attend(q, k, v, _mask(config, positions, positions, is_global))
        return _rest(config, layer, x, attended), None

    x, _ = lax.scan(block, _embed(config, params, tokens), (params["layers"], config.is_global))
    return rms_norm(x, params["final_norm"], config.norm_eps) @ params["embed"].T


def _read(
    config: Config, params: Params, tokens: Array, cache: Cache, length: Array | int
) -> tuple[Array, Cache]:
    """Append tokens: i32[batch, seq] to the cache; final hidden states x: [batch, seq, d_model].

    The cache is part of the scan's carry and each layer writes only its new rows, so XLA updates
    the buffers in place. As a scanned input and output it would be copied whole at every step.
    """
    pos, max_len = cache["pos"], cache["v"].shape[3]
    positions, filled = pos + jnp.arange(tokens.shape[1]), pos + tokens.shape[1]

    def block(
        carry: tuple[Array, Array, Array], scanned: tuple[Params, Array, Array]
    ) -> tuple[Any, None]:
        x, keys, values = carry
        layer, is_global, index = scanned
        q, k, v = _qkv(config, layer, x, positions, is_global)
        keys, values = remember((keys, values), index, pos, k, v)
        mask = _mask(config, positions, jnp.arange(max_len), is_global)
        x = _rest(config, layer, x, attend_cache(q, (keys, values), index, filled, mask))
        return (x, keys, values), None

    carry = (_embed(config, params, tokens), cache["k"], cache["v"])
    scanned = (params["layers"], config.is_global, jnp.arange(config.layers))
    (x, keys, values), _ = lax.scan(block, carry, scanned)
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    return x, {"k": keys, "v": values, "pos": pos + length}


def _embed(config: Config, params: Params, tokens: Array) -> Array:
    return params["embed"][tokens] * math.sqrt(config.d_model)


def _mask(config: Config, queries: Array, keys: Array, is_global: Array) -> Array:
    """Which keys at i32[t] the queries at i32[s] may see: bool[s, t]."""
    distance = queries[:, None] - keys
    return (distance >= 0) & (is_global | (distance < config.window))


def _qkv(
    config: Config, layer: Params, x: Array, positions: Array, is_global: Array
) -> tuple[Array, Array, Array]:
    """Queries [b, k, g, s, h], keys [b, k, h, s] and values [b, k, s, h] of x: [b, s, d_model]."""
    batch, seq, _ = x.shape
    x = rms_norm(x, layer["attn_norm"], config.norm_eps)
    q = (x @ layer["wq"]).reshape(batch, seq, config.kv_heads, config.group, config.head_dim)
    k = (x @ layer["wk"]).reshape(batch, seq, config.kv_heads, config.head_dim)
    v = (x @ layer["wv"]).reshape(batch, seq, config.kv_heads, config.head_dim)
    q = rms_norm(q, layer["q_norm"], config.norm_eps)
    k = rms_norm(k, layer["k_norm"], config.norm_eps)
    base = jnp.where(is_global, config.global_rope_base, config.local_rope_base)
    q = rotate(jnp.einsum("bskgh->bkgsh", q), positions, base)
    k = rotate(jnp.einsum("bskh->bksh", k), positions, base)
    return q, jnp.einsum("bksh->bkhs", k), jnp.einsum("bskh->bksh", v)


def _rest(config: Config, layer: Params, x: Array, attended: Array) -> Array:
    """What a layer does with x: [b, s, d_model] after its heads: attended: [b, s, heads * h]."""
    mixed = attended @ layer["wo"]
    x = x + rms_norm(mixed, layer["post_attn_norm"], config.norm_eps)
    y = rms_norm(x, layer["ffn_norm"], config.norm_eps)
    y = (jax.nn.gelu(y @ layer["w_gate"], approximate=True) * (y @ layer["w_up"])) @ layer["w_down"]
    return x + rms_norm(y, layer["post_ffn_norm"], config.norm_eps)
