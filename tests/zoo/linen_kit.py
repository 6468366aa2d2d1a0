"""Parts that several models built with Flax Linen share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from tests.zoo.model import Built

__all__ = ["Attention", "RMSNorm", "cache_of", "drawn", "filled", "forward", "params_of", "scanned"]


class RMSNorm(nn.Module):
    """In float32, times a scale, or one more than a parameter as Gemma has it."""

    offset: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return (y * (self.offset + scale)).astype(x.dtype)


def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding: halves against halves."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * 10000.0 ** -(jnp.arange(half) / half)
    angles = jnp.concatenate((angles, angles), axis=-1)
    turned = jnp.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    return (x * jnp.cos(angles) + turned * jnp.sin(angles)).astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with a `cache` collection, if there is one.

    Attributes:
      c_attn: a layer for queries, keys and values at once; else there are three.
      c_proj: the layer behind; a plain one if missing.
    """

    dtype: Any
    heads: int = 4
    kv_heads: int = 4
    bias: bool = False
    rope: bool = False
    c_attn: nn.Module | None = None
    c_proj: nn.Module | None = None

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, init_cache: bool = False) -> jax.Array:
        *lead, d = x.shape
        size = d // self.heads
        dense = functools.partial(nn.Dense, use_bias=self.bias, dtype=self.dtype)
        if self.c_attn is not None:
            q, k, v = jnp.split(self.c_attn(x), 3, axis=-1)
        else:
            q = dense(d, name="q_proj")(x)
            k, v = (dense(self.kv_heads * size, name=f"{n}_proj")(x) for n in "kv")
        q = q.reshape(*lead, self.heads, size)
        k, v = (y.reshape(*lead, self.kv_heads, size) for y in (k, v))
        if self.rope:
            q, k = rotated(q, positions), rotated(k, positions)
        if init_cache or self.has_variable("cache", "cached_key"):
            k, v = self._cached(k, v)
        mask = jnp.arange(k.shape[1]) <= positions[:, None, :, None]
        k, v = (jnp.repeat(y, self.heads // self.kv_heads, axis=2) for y in (k, v))
        bias = jnp.where(mask, 0.0, jnp.finfo(self.dtype).min).astype(self.dtype)
        y = nn.dot_product_attention(q, k, v, bias=bias, dtype=self.dtype)
        out = dense(d, name="o_proj") if self.c_proj is None else self.c_proj
        return out(y.reshape(*lead, d))

    def _cached(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        filling = self.has_variable("cache", "cached_key")
        keys = self.variable("cache", "cached_key", jnp.zeros, k.shape, k.dtype)
        values = self.variable("cache", "cached_value", jnp.zeros, v.shape, v.dtype)
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        if filling:
            start = (0, index.value, 0, 0)
            keys.value = lax.dynamic_update_slice(keys.value, k, start)
            values.value = lax.dynamic_update_slice(values.value, v, start)
            index.value = index.value + k.shape[1]
        return keys.value, values.value


def scanned(layer: type[nn.Module]) -> Any:
    """Three layers as T5X and MaxText scan them: recomputed for gradients, weights on axis 1."""
    return nn.scan(
        nn.remat(layer, prevent_cse=False),
        variable_axes={"params": 1},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=3,
    )


def drawn(shapes: Any, dtype: Any) -> Any:
    """Parameters of the given shapes; to compile the initialisers would take a second a model."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> jax.Array:
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.2
        numbers = rng.normal(size=leaf.shape) * scale + (path[-1].key in ("scale", "gamma"))
        return jax.device_put(numbers.astype(jnp.dtype(dtype)))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def params_of(model: nn.Module, dtype: Any, *args: Any) -> Any:
    return drawn(jax.eval_shape(model.init, jax.random.key(0), *args)["params"], dtype)


def forward(make: Callable[[Any], nn.Module], *args: Any) -> Callable[[Any], Built]:
    """How to build a model that is called on arrays; those of real numbers get its dtype."""

    def build(dtype: Any) -> Built:
        model = make(dtype)

        def fn(params: Any, *args: Any) -> Any:
            return model.apply({"params": params}, *args)

        cast = [a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in args]
        return Built(fn, params_of(model, dtype, *args), tuple(cast))

    return build


def cache_of(model: nn.Module, length: int, *args: Any, **kwargs: Any) -> Any:
    """An empty cache for one sequence."""
    tokens = jnp.zeros((1, length), jnp.int32)

    def init() -> Any:
        return model.init(jax.random.key(0), tokens, *(args or (tokens,)), **kwargs)["cache"]

    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init))


def filled(cache: Any, length: int) -> Any:
    """A cache as it is behind some tokens."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else jnp.full(leaf.shape, length, leaf.dtype)
        ),
        cache,
    )
