"""The SmolLM2 transformer: three functions over a plain dict of arrays.

    prefill(config, params, tokens, cache)      read a prompt, remember its keys and values
    decode_step(config, params, token, cache)   one more token per sequence
    forward(config, params, tokens)             logits at every position, no cache

Bind the config once, then compile; the cache is donated, so a step updates it in place:

    step = jax.jit(functools.partial(model.decode_step, config), donate_argnames="cache")
    logits, cache = step(params, token, cache)

Each layer is  x += attention(norm(x));  x += ffn(norm(x)).  The layers are stacked on a leading
axis and run under `lax.scan`, so one layer is compiled, not thirty. Attention is grouped: each
key-value head serves `group` query heads. Positions enter by rotating queries and keys (RoPE).

Letters in the einsums: b batch, s query position, t key position, k key-value head, g query head
within its group, h element of a head.
"""

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
    rope_base: float
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads


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
    mask = positions[:, None] >= positions

    def block(x: Array, layer: Params) -> tuple[Array, None]:
        q, k, v = _qkv(config, layer, x, positions)
        x = x + attend(q, k, v, mask) @ layer["wo"]
        return x + _ffn(config, layer, x), None

    x, _ = lax.scan(block, params["embed"][tokens], params["layers"])
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
    mask = positions[:, None] >= jnp.arange(max_len)

    def block(carry: tuple[Array, Array, Array], scanned: tuple[Params, Array]) -> tuple[Any, None]:
        x, keys, values = carry
        layer, index = scanned
        q, k, v = _qkv(config, layer, x, positions)
        keys, values = remember((keys, values), index, pos, k, v)
        x = x + attend_cache(q, (keys, values), index, filled, mask) @ layer["wo"]
        x = x + _ffn(config, layer, x)
        return (x, keys, values), None

    carry = (params["embed"][tokens], cache["k"], cache["v"])
    scanned = (params["layers"], jnp.arange(config.layers))
    (x, keys, values), _ = lax.scan(block, carry, scanned)
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    return x, {"k": keys, "v": values, "pos": pos + length}


def _qkv(config: Config, layer: Params, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Queries [b, k, g, s, h], keys [b, k, h, s] and values [b, k, s, h] of x: [b, s, d_model]."""
    batch, seq, _ = x.shape
    x = rms_norm(x, layer["attn_norm"], config.norm_eps)
    q = (x @ layer["wq"]).reshape(batch, seq, config.kv_heads, config.group, config.head_dim)
    k = (x @ layer["wk"]).reshape(batch, seq, config.kv_heads, config.head_dim)
    v = (x @ layer["wv"]).reshape(batch, seq, config.kv_heads, config.head_dim)
    q = rotate(jnp.einsum("bskgh->bkgsh", q), positions, config.rope_base)
    k = rotate(jnp.einsum("bskh->bksh", k), positions, config.rope_base)
    return q, jnp.einsum("bksh->bkhs", k), jnp.einsum("bskh->bksh", v)


def _ffn(config: Config, layer: Params, x: Array) -> Array:
    """SwiGLU of x: [b, s, d_model]."""
    x = rms_norm(x, layer["ffn_norm"], config.norm_eps)
    return (jax.nn.silu(x @ layer["w_gate"]) * (x @ layer["w_up"])) @ layer["w_down"]
