"""Activations, and other spellings of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

relu2 = lambda h: jnp.square(jax.nn.relu(h))  # noqa: E731
gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


@jax.custom_jvp
def custom_relu(h):
    return jnp.maximum(h, 0)


@custom_relu.defjvp
def _(primals, tangents):
    return custom_relu(*primals), tangents[0] * (primals[0] > 0)


@jax.custom_vjp
def custom_silu(h):
    return h * jax.nn.sigmoid(h)


custom_silu.defvjp(lambda h: (custom_silu(h), h), lambda h, g: (g * jax.nn.sigmoid(h),))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "relu2": relu2,
    "relu6": jax.nn.relu6,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda h: h * jax.nn.sigmoid(1.702 * h),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
}
SPELLINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "maximum": ("relu", lambda h: jnp.maximum(h, 0)),
    "where": ("relu", lambda h: jnp.where(h > 0, h, 0)),
    "times a mask": ("relu", lambda h: h * (h > 0)),
    "clip": ("relu", lambda h: jnp.clip(h, 0)),
    "custom_jvp": ("relu", custom_relu),
    "relu by relu": ("relu2", lambda h: jax.nn.relu(h) * jax.nn.relu(h)),
    "relu to the power 2": ("relu2", lambda h: jax.nn.relu(h) ** 2),
    "relu to the power 2.0": ("relu2", lambda h: jnp.power(jax.nn.relu(h), 2.0)),
    "gelu by erf": ("gelu", lambda h: 0.5 * h * (1 + lax.erf(h / np.sqrt(2)))),
    "gelu by erfc": ("gelu", lambda h: 0.5 * h * lax.erfc(-h / np.sqrt(2))),
    "gelu by normal cdf": ("gelu", lambda h: h * jax.scipy.stats.norm.cdf(h)),
    "gelu by tanh": (
        "gelu_tanh",
        lambda h: 0.5 * h * (1 + jnp.tanh(0.7978845608 * (h + 0.044715 * h**3))),
    ),
    "silu by exp": ("silu", lambda h: h / (1 + jnp.exp(-h))),
    "silu by tanh": ("silu", lambda h: h * 0.5 * (1 + jnp.tanh(0.5 * h))),
    "custom_vjp": ("silu", custom_silu),
    "jit in jit": ("silu", jax.jit(lambda h: h * jax.jit(jax.nn.sigmoid)(h))),
    "checkpoint_name": ("relu", lambda h: checkpoint_name(jax.nn.relu(h), "hidden")),
    "stop_gradient": ("relu", lambda h: jax.nn.relu(lax.stop_gradient(h))),
    "optimization_barrier": ("relu", lambda h: lax.optimization_barrier(jax.nn.relu(h))),
    "hard_tanh": ("custom", jax.nn.hard_tanh),
    "celu": ("elu", jax.nn.celu),
    "shrink": ("custom", lambda h: jnp.where(jnp.abs(h) > 0.5, h, 0)),
}
