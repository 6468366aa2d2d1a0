"""SmolLM2 with a position for each slot: what a server that batches continuously calls.

    decode(config, params, token, cache, active)                   one more token in each slot
    read(config, params, tokens, cache, slot, start, length)       a chunk of a prompt in one slot

The weights are those of `examples.smollm2.model`, whose step has one position for all sequences.
Here requests join and leave: a slot has a position of its own, and the shapes are always the same,
so that each function is compiled once. Slots without a request compute along; nobody reads what
they say, and what they write lies where the slot's next token overwrites it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..layers import Cache, attend, attend_cache, rms_norm, rotate
from ..layers import init_cache as one_position
from ..smollm2.model import Config, Params

__all__ = ["Cache", "decode", "init_cache", "read"]


def init_cache(config: Config, slots: int, max_len: int) -> Cache:
    """An empty cache as that of `examples.layers`, but with pos: i32[slots]."""
    return one_position(config, slots, max_len) | {"pos": jnp.zeros(slots, jnp.int32)}


def decode(
    config: Config, params: Params, token: Array, cache: Cache, active: Array
) -> tuple[Array, Cache]:
    """Read token: i32[slots]; logits: [slots, vocab] for the next ones, and the cache.

    active: bool[slots], the slots that go on; the position of others stays.
    """
    pos, max_len = cache["pos"], cache["v"].shape[3]
    slots = jnp.arange(token.shape[0])
    mask = (jnp.arange(max_len) <= pos[:, None])[:, None, None, None]  # as [b, k, g, s, t]
    filled = jnp.where(active, pos, 0).max() + 1

    def remember(keys: Array, values: Array, layer: Array, k: Array, v: Array) -> Any:
        keys = keys.at[layer, slots, :, :, pos].set(k[..., 0])
        return keys, values.at[layer, slots, :, pos].set(v[:, :, 0])

    def look(q: Array, keys: Array, values: Array, layer: Array) -> Array:
        return attend_cache(q, (keys, values), layer, filled, mask)

    x, keys, values = _layers(config, params, token[:, None], pos[:, None], cache, remember, look)
    cache = {"k": keys, "v": values, "pos": pos + active}
    return x[:, 0] @ params["embed"].T, cache


def read(
    config: Config,
    params: Params,
    tokens: Array,
    cache: Cache,
    slot: Array | int,
    start: Array | int,
    length: Array | int,
) -> tuple[Array, Cache]:
    """Read tokens: i32[chunk] into a slot from position `start` on; logits: [1, vocab] after the
    last, and the cache.

    Only `length` of the tokens are real, the others are padding. `start + chunk` must not exceed
    the cache's `max_len`.
    """
    chunk, max_len = tokens.shape[0], cache["v"].shape[3]
    positions = start + jnp.arange(chunk)
    mask = positions[:, None] >= jnp.arange(max_len)

    def remember(keys: Array, values: Array, layer: Array, k: Array, v: Array) -> Any:
        keys = lax.dynamic_update_slice(keys, k[None], (layer, slot, 0, 0, start))
        return keys, lax.dynamic_update_slice(values, v[None], (layer, slot, 0, start, 0))

    def look(q: Array, keys: Array, values: Array, layer: Array) -> Array:
        return attend(q, keys[layer, slot][None], values[layer, slot][None], mask)

    x, keys, values = _layers(config, params, tokens[None], positions[None], cache, remember, look)
    last = lax.dynamic_index_in_dim(x, length - 1, axis=1, keepdims=False)
    cache = {"k": keys, "v": values, "pos": cache["pos"].at[slot].set(start + length)}
    return last @ params["embed"].T, cache


def _layers(
    config: Config,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: Cache,
    remember: Callable[..., Any],
    look: Callable[..., Array],
) -> tuple[Array, Array, Array]:
    """Final hidden states x: [b, s, d_model] of tokens and positions: i32[b, s]; keys and values.

    remember: (keys, values, layer, k: [b, k, h, s], v: [b, k, s, h]) to keys and values.
    look: (q: [b, k, g, s, h], keys, values, layer) to what is mixed of the values.
    """

    def block(carry: tuple[Array, Array, Array], scanned: tuple[Params, Array]) -> tuple[Any, None]:
        x, keys, values = carry
        layer, index = scanned
        q, k, v = _qkv(config, layer, rms_norm(x, layer["attn_norm"], config.norm_eps), positions)
        keys, values = remember(keys, values, index, k, v)
        x = x + look(q, keys, values, index) @ layer["wo"]
        y = rms_norm(x, layer["ffn_norm"], config.norm_eps)
        x = x + (jax.nn.silu(y @ layer["w_gate"]) * (y @ layer["w_up"])) @ layer["w_down"]
        return (x, keys, values), None

    carry = (params["embed"][tokens], cache["k"], cache["v"])
    scanned = (params["layers"], jnp.arange(config.layers))
    (x, keys, values), _ = lax.scan(block, carry, scanned)
    return rms_norm(x, params["final_norm"], config.norm_eps), keys, values


def _qkv(config: Config, layer: Params, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Queries [b, k, g, s, h], keys [b, k, h, s] and values [b, k, s, h] of x: [b, s, d_model]."""
    batch, seq, _ = x.shape
    q = (x @ layer["wq"]).reshape(batch, seq, config.kv_heads, config.group, config.head_dim)
    k = (x @ layer["wk"]).reshape(batch, seq, config.kv_heads, config.head_dim)
    v = (x @ layer["wv"]).reshape(batch, seq, config.kv_heads, config.head_dim)
    q = rotate(jnp.einsum("bskgh->bkgsh", q), positions[:, None, None], config.rope_base)
    k = rotate(jnp.einsum("bskh->bksh", k), positions[:, None], config.rope_base)
    return q, jnp.einsum("bksh->bkhs", k), jnp.einsum("bskh->bksh", v)
