"""What the example models share: layers, and the cache of keys and values."""

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

Cache = dict[str, Array]


class CacheSizes(Protocol):
    """A model's config, as far as its cache depends on it."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def init_cache(
    config: CacheSizes, batch: int, max_len: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """An empty cache, of dtype:

    k: [layers, batch, kv_heads, head_dim, max_len], v: [layers, batch, kv_heads, max_len, head_dim]
    and pos: i32[].

    `pos` counts the tokens read so far; all sequences of the batch advance together. Keys and
    values lie as their products read them: otherwise XLA transposes all keys at each step.
    """
    shape = (config.layers, batch, config.kv_heads)
    return {
        "k": jnp.zeros((*shape, config.head_dim, max_len), dtype),
        "v": jnp.zeros((*shape, max_len, config.head_dim), dtype),
        "pos": jnp.int32(0),
    }


def remember(
    cache: tuple[Array, Array], layer: Array, pos: Array, k: Array, v: Array
) -> tuple[Array, Array]:
    """All keys and values, with those of a layer's tokens from `pos` on: k: [b, k, h, s] and
    v: [b, k, s, h]."""
    keys, values = cache
    keys = lax.dynamic_update_slice(keys, k[None], (layer, 0, 0, 0, pos))
    return keys, lax.dynamic_update_slice(values, v[None], (layer, 0, 0, pos, 0))


def rotate(x: Array, positions: Array, base: Array | float) -> Array:
    """RoPE over x: [..., s, h]: the pair (x[i], x[i + h/2]) turns by position * base^(-2i/h).

    positions: i32[s], or [..., s] where they are not the same for all of x.
    """
    half = x.shape[-1] // 2
    angle = positions[..., None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Mix v: [b, k, t, h] by the softmax of q: [b, k, g, s, h] on k: [b, k, h, t], heads joined.

    mask: bool[s, t] is true where a query may look; with more axes it is of [b, k, g, s, t].
    Returns [b, s, k * g * h]. Letters: b batch, s query position, t key position, k key-value head,
    g query head within its group, h element.
    """
    scores = jnp.einsum("bkgsh,bkht->bkgst", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkgst,bkth->bkgsh", weights, v)
    batch, _, _, seq, _ = mixed.shape
    return jnp.einsum("bkgsh->bskgh", mixed).reshape(batch, seq, -1)


def attend_cache(
    q: Array, cache: tuple[Array, Array], layer: Array, filled: Array, mask: Array
) -> Array:
    """`attend` on a layer of all keys and values, of which `filled` tokens are there: i32[].

    mask: bool[s, max_len], or with more axes as in `attend`.
    """
    operands = (q, *cache, layer, filled, mask)
    return lax.platform_dependent(*operands, cpu=_attend_filled, default=_attend_layer)


def _attend_layer(
    q: Array, keys: Array, values: Array, layer: Array, filled: Array, mask: Array
) -> Array:
    return attend(q, keys[layer], values[layer], mask)


def _attend_filled(
    q: Array, keys: Array, values: Array, layer: Array, filled: Array, mask: Array
) -> Array:
    """On CPU XLA copies a layer's keys and values before their products: no more than the first 64,
    128, 256, ... tokens, as `filled` needs."""
    max_len = values.shape[3]
    lengths = [*(n for n in (1 << i for i in range(6, 31)) if n < max_len), max_len]

    def of_first(length: int) -> Callable[..., Array]:
        def run(q: Array, keys: Array, values: Array, layer: Array, mask: Array) -> Array:
            _, batch, heads, _, size = values.shape
            k = lax.dynamic_slice(keys, (layer, 0, 0, 0, 0), (1, batch, heads, size, length))
            v = lax.dynamic_slice(values, (layer, 0, 0, 0, 0), (1, batch, heads, length, size))
            return attend(q, k[0], v[0], mask[..., :length])

        return run

    enough = jnp.searchsorted(jnp.array(lengths), filled)
    return lax.switch(enough, list(map(of_first, lengths)), q, keys, values, layer, mask)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMS norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale
