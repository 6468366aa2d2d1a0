"""Layers that both example models have."""

import jax.numpy as jnp
from jax import Array, lax


def rotate(x: Array, positions: Array, base: float) -> Array:
    """RoPE over x: [..., s, h]: the pair (x[i], x[i + h/2]) turns by position * base^(-2i/h)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMS norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale
