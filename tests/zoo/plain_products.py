"""Models in plain JAX whose linear layers are written in other ways than `x @ w`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.model import Built, Model, ffn, head
from tests.zoo.plain import attend, norm, normal

D, F, V, T = 32, 96, 256, 4
HEADS, H = 4, 8
NWC = ("NWC", "WIO", "NWC")
NCW = ("NCW", "OIW", "NCW")


def _params(dtype: Any, **more: Any) -> dict[str, Any]:
    return more | {
        "embed": normal(90, V, D, dtype=dtype), "norm": jnp.ones(D, dtype),
        "lm_head": normal(91, D, V, dtype=dtype),
    }  # fmt: skip


def _tokens() -> jax.Array:
    return jnp.arange(T)[None]


def _logits(params: Any, x: jax.Array) -> jax.Array:
    return norm(x, params["norm"]) @ params["lm_head"]


def _einsums(dtype: Any) -> Built:
    """Weights of three and four axes, contracted in the middle, at the end, and over two axes in
    the other order."""
    params = _params(
        dtype,
        qkv=normal(0, 3, HEADS, D, H, dtype=dtype),
        out=normal(1, H * D, HEADS, dtype=dtype).reshape(H, D, HEADS) / H**0.5,
        left=normal(2, D, D, dtype=dtype).T,
        cross=normal(3, D, D, dtype=dtype).reshape(D, H, HEADS),
    )

    def forward(params, tokens):
        x = params["embed"][tokens]
        q, k, v = jnp.einsum("btd,sndh->sbtnh", norm(x, params["norm"]), params["qkv"])
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k).astype(jnp.float32)
        mixed = jnp.einsum("bnqk,bknh->bqhn", jax.nn.softmax(scores).astype(v.dtype), v)
        x = x + jnp.einsum("bqhn,hdn->bqd", mixed, params["out"])
        x = x + jnp.einsum("dhn,bthn->btd", params["cross"], jnp.tanh(mixed))
        return _logits(params, x + jnp.einsum("od,btd->bto", params["left"], jnp.tanh(x)))

    return Built(forward, params, (_tokens(),))


def _made_at_each_call(dtype: Any) -> Built:
    """Weights that are concatenated, flipped, reshaped, scaled, merged with an adapter."""
    params = _params(
        dtype,
        q=normal(0, D, D, dtype=dtype), k=normal(1, D, D, dtype=dtype),
        v=normal(2, D, D, dtype=dtype), o=normal(3, D, D, dtype=dtype).reshape(HEADS, H, D),
        mix=normal(4, D, D, dtype=dtype), a=normal(5, D, 4, dtype=dtype),
        b=normal(6, 4, D, dtype=dtype), scale=0.5 + jnp.arange(D, dtype=dtype) / D,
    )  # fmt: skip

    def forward(params, tokens):
        x = params["embed"][tokens]
        fused = jnp.concatenate([params[name] for name in "qkv"], axis=1)
        h = norm(x, params["norm"]) @ fused
        q, k, v = (a.reshape(*a.shape[:-1], HEADS, H) for a in jnp.split(h, 3, axis=-1))
        mixed = attend(q, k, v, jnp.ones((T, T), bool))
        x = x + mixed @ params["o"].reshape(D, D)
        merged = params["mix"] + 2 * params["a"] @ params["b"]
        x = x + jnp.tanh(x) @ merged
        x = x + jnp.sin(x) @ params["mix"][::-1]
        x = x + jnp.cos(x) @ (params["mix"] + params["mix"].T)
        return _logits(params, x + jnp.tanh(x) @ (params["mix"] * params["scale"]))

    return Built(forward, params, (_tokens(),))


def _adapters(dtype: Any) -> Built:
    """Low-rank adapters beside frozen weights; one of each stack is chosen by the request."""
    layers = [
        {"w": normal(i, D, D, dtype=dtype), "a": normal(i + 2, D, 4, dtype=dtype),
         "b": normal(i + 4, 4, D, dtype=dtype), "tasks_a": normal(i + 6, 3, D, 4, dtype=dtype),
         "tasks_b": normal(i + 8, 3, 4, D, dtype=dtype)}
        for i in (0, 1)
    ]  # fmt: skip
    params = _params(dtype, layers=layers)

    def forward(params, tokens, task):
        x = params["embed"][tokens]
        for w in params["layers"]:
            h = norm(x, params["norm"])
            y = h @ w["w"] + 0.5 * (h @ w["a"]) @ w["b"]
            x = x + jnp.tanh(y + (h @ w["tasks_a"][task]) @ w["tasks_b"][task])
        return _logits(params, x)

    return Built(forward, params, (_tokens(), jnp.int32(1)))


def _convolutions(dtype: Any) -> Built:
    """Products as convolutions of window 1, tokens first and channels first, around one over
    tokens; one of them in groups."""
    params = _params(
        dtype,
        up=normal(0, 1, D, 2 * D, dtype=dtype), depthwise=normal(1, 3, 1, D, dtype=dtype),
        down=normal(2, D, D, dtype=dtype).T[..., None],
        grouped=normal(3, 1, D // 4, D, dtype=dtype),
    )  # fmt: skip

    def convolve(x, w, layout, groups=1):
        return lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    def forward(params, tokens):
        x = params["embed"][tokens]
        h = jax.nn.glu(convolve(norm(x, params["norm"]), params["up"], NWC))
        h = jax.nn.silu(convolve(h, params["depthwise"], NWC, groups=D))
        x = x + convolve(h.swapaxes(1, 2), params["down"], NCW).swapaxes(1, 2)
        return _logits(params, x + convolve(jnp.tanh(x), params["grouped"], NWC, groups=4))

    return Built(forward, params, (_tokens(),))


def _mixed_precision(dtype: Any) -> Built:
    """Weights in float32, float16 and float8, cast where they are used; sums in float32."""
    params = _params(
        jnp.float32,
        q=normal(0, D, D, dtype=jnp.float32), k=normal(1, D, D, dtype=jnp.float16),
        v=normal(2, D, D, dtype=jnp.float8_e4m3fn), o=normal(3, D, D, dtype=dtype),
        bias=normal(4, D, dtype=jnp.float32),
    )  # fmt: skip

    def wide(x, w):
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)

    def forward(params, tokens):
        x = params["embed"][tokens]
        h = (norm(x, params["norm"]) + params["bias"]).astype(jnp.bfloat16)
        q = wide(h, params["q"].astype(jnp.bfloat16)) + params["bias"]
        k = h @ params["k"].astype(jnp.bfloat16)
        v = jnp.matmul(h, params["v"].astype(jnp.bfloat16)).astype(jnp.float32)
        mixed = q * jax.nn.sigmoid(k.astype(jnp.float32)) + jnp.tanh(v)
        x = x + mixed.astype(params["o"].dtype) @ params["o"]
        return _logits(params, x.astype(jnp.float32))

    return Built(forward, params, (_tokens(),))


def _own_weights(dtype: Any) -> Built:
    """Products under `vmap`: each head has its own input and weight, or one input and its own
    weight; and weights as blocks on a diagonal."""
    params = _params(
        dtype,
        same=normal(0, HEADS, D, H, dtype=dtype), own=normal(1, HEADS, H, H, dtype=dtype),
        diagonal=normal(2, HEADS, H, H, dtype=dtype), o=normal(3, D, D, dtype=dtype),
        value=normal(4, D, dtype=dtype) / D**0.5,
    )  # fmt: skip

    def forward(params, tokens):
        x = params["embed"][tokens]
        h = jax.vmap(lambda w: norm(x, params["norm"]) @ w)(params["same"])
        h = jax.vmap(lambda w, h: jnp.tanh(h @ w))(params["own"], h)
        h = jnp.einsum("gbti,gio->btgo", h, params["diagonal"]).reshape(x.shape)
        x = x + jnp.tanh(h) @ params["o"]
        return _logits(params, x), x @ params["value"]

    return Built(forward, params, (_tokens(),))


def _energy(dtype: Any) -> Built:
    """The gradient of an energy is a part of the model: a weight is read along both its axes."""
    params = _params(dtype, w=normal(0, D, D, dtype=dtype), v=normal(1, D, F, dtype=dtype))

    def forward(params, tokens):
        x = params["embed"][tokens]

        def energy(x):
            h = jnp.tanh(x @ params["w"])
            return jnp.sum(jnp.logaddexp(h @ params["v"], 0).astype(jnp.float32))

        for _ in range(2):
            x = x - 0.1 * jax.grad(energy)(x)
        return _logits(params, x)

    return Built(forward, params, (_tokens(),))


_HEAD = head("params/lm_head", D, V)

MODELS = [
    Model("JAX", "products as einsums", "forward", _einsums, (_HEAD,), linears=4),
    Model("JAX", "weights made at each call", "forward", _made_at_each_call, (_HEAD,), linears=6),
    Model("JAX", "adapters chosen by the request", "forward", _adapters, (_HEAD,), linears=6),
    Model("JAX", "products as convolutions", "forward", _convolutions, (_HEAD,), linears=2),
    Model("JAX", "mixed precision", "forward", _mixed_precision, (_HEAD,), linears=4),
    # Two products with a `tanh` between them are a block: here of experts, below of a softplus.
    Model("JAX", "weights under vmap", "forward", _own_weights, (
        ffn("params/diagonal", H, H, "tanh", experts=HEADS), _HEAD), linears=3),
    Model("JAX", "energy descent", "forward", _energy, (
        *(ffn(f"params/v#{i}", D, F, "sigmoid") for i in (1, 2)), _HEAD), linears=4),
]  # fmt: skip
