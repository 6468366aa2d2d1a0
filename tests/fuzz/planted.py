"""What is planted in a random function: blocks, heads and layers, written in many ways, and near
misses, which look like blocks and heads and must be left alone.

All are functions of their own weights (a dict) and an activation [..., D], and return [..., D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.cases_activation import ACTIVATIONS, SPELLINGS

D, F, V = 8, 24, 40

Weights = Mapping[str, Any]
Block = Callable[[Weights, Any], Any]

ACTS: dict[str, Callable[[Any], Any]] = {
    **ACTIVATIONS,
    **{name: act for name, (_, act) in SPELLINGS.items()},
}
"""Functions of one neuron each, by name."""


# Products: each multiplies the last axis of x by the first of w, whatever else it has.


def _einsum(x: Any, w: Any) -> Any:
    return jnp.einsum("...d,df->...f", x, w)


def _dot_general(x: Any, w: Any) -> Any:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _vmapped(x: Any, w: Any) -> Any:
    return _dot_general(x, w) if x.ndim == 1 else jax.vmap(lambda row: _vmapped(row, w))(x)


def _left(x: Any, w: Any) -> Any:
    return jnp.moveaxis(jnp.tensordot(w, x, ((0,), (x.ndim - 1,))), 0, -1)


def _folded(x: Any, w: Any) -> Any:
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def _wide(x: Any, w: Any) -> Any:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _two_axes(x: Any, w: Any) -> Any:
    """The contracted axis in two: heads and their width."""
    x = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return jnp.einsum("...gd,gdf->...f", x, w.reshape(2, -1, w.shape[-1]))


PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {
    "matmul": lambda x, w: x @ w,
    "einsum": _einsum,
    "dot_general": _dot_general,
    "vmapped": _vmapped,
    "left": _left,
    "folded": _folded,
    "wide": _wide,
    "two axes": _two_axes,
    "jitted": jax.jit(lambda x, w: x @ w),
    "highest": functools.partial(jnp.matmul, precision="highest"),
}
"""Ways to multiply; all give the same numbers."""

STORED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "as it is": (lambda w: w, lambda w: w),
    "transposed": (lambda w: np.swapaxes(w, -1, -2), lambda w: jnp.swapaxes(w, -1, -2)),
    "bfloat16": (lambda w: w.astype(jnp.bfloat16), lambda w: w.astype(jnp.float32)),
    "scaled": (lambda w: w * 2, lambda w: w * 0.5),
}
"""Ways to store a matrix, and what reads it."""


def norm(x: Any) -> Any:
    """Each token scaled to the same length: what is computed before it is no part of a block."""
    size = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * lax.rsqrt(size + 1e-5).astype(x.dtype)).astype(x.dtype)


# Near misses: their weights are up, gate [D, F], down [F, D], out [2 F, D], square [D, D].


def _with_hidden(consume: Callable[[Any], Any]) -> Block:
    """The hidden neurons are read by something else, too."""

    def block(w: Weights, x: Any) -> Any:
        hidden = jax.nn.relu(x @ w["up"])
        return hidden @ w["down"] + consume(hidden)

    return block


def _between(mix: Callable[[Any], Any]) -> Block:
    """Something between the layers that does not treat each neuron separately."""
    return lambda w, x: mix(jax.nn.silu(x @ w["up"])) @ w["down"]


def _normed(h: Any) -> Any:
    return (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)


def _carried(w: Weights, x: Any) -> Any:
    """Hidden neurons that go from one iteration to the next."""

    def body(hidden: Any, _: Any) -> Any:
        y = jnp.tanh(jax.nn.relu(hidden) @ w["down"])
        return y @ w["up"], y

    return lax.scan(body, x @ w["up"], length=2)[1].sum(0)


def _other_input(w: Weights, x: Any) -> Any:
    return (jax.nn.silu(x @ w["gate"]) * (jnp.sin(x) @ w["up"])) @ w["down"]


def _computed(w: Weights, x: Any) -> Any:
    return jax.nn.relu(x @ (w["up"] * x.mean())) @ w["down"]


def _gate_twice(w: Weights, x: Any) -> Any:
    gate = jax.nn.silu(x @ w["gate"])
    return (gate * (x @ w["up"])) @ w["down"] + gate.max(-1, keepdims=True)


def _joined(w: Weights, x: Any) -> Any:
    hidden = jax.nn.relu(x @ w["up"])
    return jnp.concatenate([hidden, hidden], -1) @ w["out"]


def _dropout(w: Weights, x: Any) -> Any:
    hidden = jax.nn.relu(x @ w["up"])
    # Of a fixed key the mask of a single token would be a weight.
    key = jax.random.fold_in(jax.random.key(3), (100 * x).sum().astype(jnp.int32))
    kept = jax.random.bernoulli(key, 0.5, hidden.shape)
    return jnp.where(kept, hidden, 0) @ w["down"]


def _attention(w: Weights, x: Any) -> Any:
    """Of each token with its own parts, so that tokens stay apart."""
    q, k = ((x @ w[name]).reshape(*x.shape[:-1], 4, F // 4) for name in ("up", "gate"))
    seen = jax.nn.softmax(jnp.einsum("...id,...jd->...ij", q, k))
    return jnp.einsum("...ij,...jd->...id", seen, k).reshape(*x.shape[:-1], F) @ w["down"]


NEAR: dict[str, Block] = {
    "no activation": lambda w, x: x @ w["up"] @ w["down"],
    "scaled alone": lambda w, x: (x @ w["up"] * 2 + 1) @ w["down"],
    "hidden summed": _with_hidden(lambda h: h.sum(-1, keepdims=True)),
    "hidden's greatest": _with_hidden(lambda h: jnp.abs(h).max(-1, keepdims=True)),
    "hidden normed": _between(_normed),
    "hidden's softmax": _between(lambda h: jax.nn.softmax(h, -1)),
    "hidden accumulated": _between(lambda h: h.cumsum(-1)),
    "hidden reversed": _between(lambda h: h[..., ::-1]),
    "hidden rolled": _between(lambda h: jnp.roll(h, 1, -1)),
    "hidden sorted": _between(lambda h: jnp.sort(h, -1)),
    "mask of all": _between(lambda h: jnp.where(h > 5 * h.min(-1, keepdims=True), h, 0)),
    "scaled by the greatest": _between(lambda h: h / (1 + jnp.abs(h).max(-1, keepdims=True))),
    "activation across neurons": _between(
        lambda h: jax.nn.softmax(h.reshape(*h.shape[:-1], 4, F // 4), -1).reshape(h.shape)
    ),
    "neurons swapped": _between(
        lambda h: jnp.swapaxes(h.reshape(*h.shape[:-1], 4, F // 4), -1, -2).reshape(h.shape)
    ),
    "hidden carried": _carried,
    "another input": _other_input,
    "weights computed": _computed,
    "gate read twice": _gate_twice,
    "hidden joined": _joined,
    "dropout": _dropout,
    "attention": _attention,
    "no first layer": lambda w, x: jax.nn.relu(x) @ w["square"],
}
"""What must not be taken for a block."""

EITHER: dict[str, Block] = {
    "some neurons returned": _with_hidden(lambda h: h[..., :D]),
    "mask of the first": _between(lambda h: jnp.where(h[..., :1] > 0, h, 0)),
    "above the mean": _between(lambda h: jnp.where(h > h.mean(-1, keepdims=True), h, 0)),
    "logits looked up": lambda w, x: lax.top_k(jax.nn.silu(x @ w["up"]), D)[0],
    "bilinear": lambda w, x: ((x @ w["gate"]) * (x @ w["up"])) @ w["down"],
    "top-k": _between(lambda h: jnp.where(h >= lax.top_k(h, 8)[0][..., -1:], h, 0)),
}
"""What may be a block or not: neurons that are read elsewhere one by one are computed apart, and
some of what looks at all neurons is known to select them."""


# Heads: functions of all logits that return [..., 1] or a token each.

EPILOGUES: dict[str, Callable[[Any], Any]] = {
    "raw": lambda z: z,
    "capped": lambda z: 3 * jnp.tanh(z / 3),
    "temperature": lambda z: z / 0.7,
    "masked": lambda z: jnp.where(jnp.arange(V) % 7 != 3, z, -1e9),
    "cast": lambda z: z.astype(jnp.float32),
    "padding cut off": lambda z: z[..., : V - 3],
}
CONSUMERS: dict[str, Callable[[Any], Any]] = {
    "greatest": lambda z: z.max(-1),
    "log-sum-exp": lambda z: jax.nn.logsumexp(z, -1),
    "probability of the best": lambda z: jax.nn.softmax(z, -1).max(-1),
    "entropy": lambda z: -(jax.nn.log_softmax(z, -1)).mean(-1),
}
NEAR_HEADS: dict[str, Block] = {
    "contracted again": lambda w, x: jax.nn.softmax(x @ w["head"], -1) @ w["embed"],
    "cut": lambda w, x: jnp.tanh(x @ w["head"])[..., : 2 * D].reshape(*x.shape[:-1], 2, D).sum(-2),
    "in parts": lambda w, x: jnp.tanh(x @ w["head"]).reshape(*x.shape[:-1], D, V // D).sum(-1),
    "narrow": lambda w, x: jax.nn.log_softmax(x @ w["square"], -1),
    "queries, keys, values": lambda w, x: sum(
        part.sum(-1, keepdims=True) for part in jnp.split(x @ w["head"], (10, 25), -1)
    ),
}
"""What must not be taken for a vocabulary head."""


def rows(rng: np.random.Generator, lead: tuple[int, ...], *shape: int) -> np.ndarray:
    """Normal numbers [*lead, *shape]; a product with a matrix of them keeps its input's scale."""
    scale = np.sqrt(shape[0]) if len(shape) > 1 else 4.0
    return (rng.standard_normal((*lead, *shape)) / scale).astype(np.float32)
