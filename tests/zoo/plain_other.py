"""Models in plain JAX whose FFN is sparse, quantized, gated elsewhere, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.zoo.model import Built, Model, ffn, head
from tests.zoo.plain import attention, layers_of, norm, normal

D, F, G, V, T = 32, 128, 96, 256, 4
Block = Callable[[Any, jax.Array], jax.Array]


def _transformer(block: Block, params: Any, attends: bool = True) -> Built:
    """Two layers of attention and a block, and a head."""

    def forward(params, tokens):
        x = params["embed"][tokens]
        for w in params["layers"]:
            if attends:
                x = x + attention(w, norm(x, w["attention_norm"]))
            x = x + block(w, norm(x, w["ffn_norm"]))
        return norm(x, params["norm"]) @ params["lm_head"]

    return Built(forward, params, (jnp.arange(T)[None],))


def _params(dtype: Any, layers: list[Any]) -> Any:
    return {
        "embed": normal(90, V, D, dtype=dtype), "layers": layers, "norm": jnp.ones(D, dtype),
        "lm_head": normal(91, D, V, dtype=dtype),
    }  # fmt: skip


def _statistical(dtype: Any) -> Built:
    """Gemma 3n: about the twentieth of the neurons that a normal distribution puts on top."""
    quantile = 1.6448536

    def block(w, h):
        gate = h @ w["w_gate"]
        cutoff = gate.mean(-1, keepdims=True) + gate.std(-1, keepdims=True) * quantile
        return (jax.nn.gelu(jax.nn.relu(gate - cutoff)) * (h @ w["w_up"])) @ w["w_down"]

    return _transformer(block, _params(dtype, [layers_of(20 * i, dtype) for i in (0, 1)]))


def _explicit(dtype: Any) -> Built:
    """Trained with all but the eight greatest neurons zeroed."""

    def block(w, h):
        up = jax.nn.relu(h @ w["w_up"])
        least = jax.lax.top_k(up, 8)[0][..., -1:]
        return jnp.where(up >= least, up, 0) @ w["w_down"]

    layers = [layers_of(20 * i, dtype, width=F, gated=False) for i in (0, 1)]
    return _transformer(block, _params(dtype, layers))


def _int8(w: jax.Array, dtype: Any) -> dict[str, jax.Array]:
    """A scale for each output."""
    scale = jnp.abs(w.astype(jnp.float32)).max(axis=0) / 127
    return {"q": jnp.round(w / scale).astype(jnp.int8), "scale": scale.astype(dtype)}


def _quantized(dtype: Any, product: Callable[[Any, jax.Array, Any], jax.Array]) -> Built:
    """All FFN matrices and the head in 8 bits; `product(weight, x, largest)` applies one."""

    def quantize(w):
        packed = {k: _int8(a, dtype) if k[:2] == "w_" else a for k, a in w.items()}
        return packed | {"ranges": {"in": jnp.float32(4), "hidden": jnp.float32(6)}}

    params = _params(dtype, [quantize(layers_of(20 * i, dtype)) for i in (0, 1)])
    params |= {"lm_head": _int8(params["lm_head"], dtype)}

    def forward(params, tokens):
        x = params["embed"][tokens]
        for w in params["layers"]:
            x = x + attention(w, norm(x, w["attention_norm"]))
            h, seen = norm(x, w["ffn_norm"]), w["ranges"]
            gate, up = (product(w[name], h, seen["in"]) for name in ("w_gate", "w_up"))
            x = x + product(w["w_down"], jax.nn.silu(gate) * up, seen["hidden"])
        return product(params["lm_head"], norm(x, params["norm"]), jnp.float32(4))

    return Built(forward, params, (jnp.arange(T)[None],))


def _dequantized(w: Any, x: jax.Array, largest: Any) -> jax.Array:
    return x @ (w["q"].astype(x.dtype) * w["scale"])


def _scaled_after(w: Any, x: jax.Array, largest: Any) -> jax.Array:
    return jnp.einsum("...d,df->...f", x, w["q"]) * w["scale"]


def _static(w: Any, x: jax.Array, largest: Any) -> jax.Array:
    """8 bits by 8 bits, the activations' range known from calibration."""
    step = largest / 127
    q = jnp.clip(jnp.round(x.astype(jnp.float32) / step), -127, 127).astype(jnp.int8)
    return _integers(q, w["q"], step * w["scale"]).astype(x.dtype)


def _dynamic(w: Any, x: jax.Array, largest: Any) -> jax.Array:
    """8 bits by 8 bits, each token scaled by its greatest entry."""
    step = jnp.abs(x.astype(jnp.float32)).max(axis=-1, keepdims=True) / 127
    q = jnp.round(x.astype(jnp.float32) / step).astype(jnp.int8)
    return _integers(q, w["q"], step * w["scale"]).astype(x.dtype)


def _integers(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, numbers, preferred_element_type=jnp.int32) * scale


def _rwkv(dtype: Any) -> Built:
    """Time mixing by a recurrence; squared ReLU, and a gate behind the second matrix."""

    def shifted(x):
        return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    def time(w, h):
        mixed = h * w["mix"] + shifted(h) * (1 - w["mix"])
        r, k, v = jax.nn.sigmoid(mixed @ w["wq"]), mixed @ w["wk"], mixed @ w["wv"]

        def step(carry, kv):
            total, weight = carry
            e = jnp.exp(kv[0])
            total, weight = 0.9 * total + e * kv[1], 0.9 * weight + e
            return (total, weight), total / weight

        start = (jnp.zeros_like(k[:, 0]), jnp.zeros_like(k[:, 0]))
        _, out = jax.lax.scan(step, start, (jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)))
        return (r * jnp.moveaxis(out, 0, 1)) @ w["wo"]

    def channel(w, h):
        for_k, for_r = (h * w[m] + shifted(h) * (1 - w[m]) for m in ("mix_k", "mix_r"))
        k = jnp.square(jax.nn.relu(for_k @ w["w_up"]))
        return jax.nn.sigmoid(for_r @ w["w_r"]) * (k @ w["w_down"])

    layers = [
        layers_of(20 * i, dtype, width=F, gated=False)
        | {"w_r": normal(15 + i, D, D, dtype=dtype)}
        | {m: jnp.full(D, 0.4 + 0.1 * i, dtype) for i, m in enumerate(("mix", "mix_k", "mix_r"))}
        for i in (0, 1)
    ]
    both = lambda w, h: time(w, h) + channel(w, h)  # noqa: E731
    return _transformer(both, _params(dtype, layers), attends=False)


def _mamba(dtype: Any) -> Built:
    """A convolution and a recurrence run over the hidden positions' tokens."""
    N = 4

    def block(w, h):
        x, z = jnp.split(h @ w["in_proj"], 2, axis=-1)
        padded = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
        x = jax.nn.silu(sum(padded[:, i : i + T] * w["conv"][i] for i in range(4)))
        delta, B, C = jnp.split(x @ w["x_proj"], [G, G + N], axis=-1)
        delta = jax.nn.softplus(delta)

        def step(state, now):
            x, delta, B, C = now
            state = state * jnp.exp(-delta[..., None] * w["A"])
            state = state + (delta * x)[..., None] * B[:, None]
            return state, (state * C[:, None]).sum(-1)

        start = jnp.zeros((len(x), G, N), x.dtype)
        over = [jnp.moveaxis(a, 1, 0) for a in (x, delta, B, C)]
        _, y = jax.lax.scan(step, start, over)
        return ((jnp.moveaxis(y, 0, 1) + x * w["skip"]) * jax.nn.silu(z)) @ w["out_proj"]

    layers = [
        {"in_proj": normal(i, D, 2 * G, dtype=dtype), "conv": normal(i + 2, 4, G, dtype=dtype),
         "x_proj": normal(i + 4, G, G + 2 * N, dtype=dtype), "skip": jnp.ones(G, dtype),
         "A": jnp.ones((G, N), dtype), "out_proj": normal(i + 6, G, D, dtype=dtype),
         "ffn_norm": jnp.ones(D, dtype)}
        for i in (0, 1)
    ]  # fmt: skip
    return _transformer(block, _params(dtype, layers), attends=False)


def _gmlp(dtype: Any) -> Built:
    """Half of the neurons gate the others after a product over the tokens."""

    def block(w, h):
        u, v = jnp.split(jax.nn.gelu(h @ w["w_up"]), 2, axis=-1)
        v = jnp.einsum("btf,st->bsf", norm(v, w["gate_norm"]), jnp.tril(w["spatial"]))
        return (u * (v + w["bias"][:, None])) @ w["w_down"]

    layers = [
        {"w_up": normal(i, D, 2 * G, dtype=dtype), "w_down": normal(i + 2, G, D, dtype=dtype),
         "spatial": normal(i + 4, T, T, dtype=dtype), "bias": jnp.ones(T, dtype),
         "gate_norm": jnp.ones(G, dtype), "ffn_norm": jnp.ones(D, dtype)}
        for i in (0, 1)
    ]  # fmt: skip
    return _transformer(block, _params(dtype, layers), attends=False)


def _ffns(activation: str, width: int = G, name: str = "w_down", **fields: Any) -> Any:
    return tuple(ffn(f"params/layers/{i}/{name}", D, width, activation, **fields) for i in (0, 1))


_HEAD = head("params/lm_head", D, V)
_SILU = _ffns("silu", name="w_down/q", gated=True)
_INT8 = head("params/lm_head/q", D, V)

MODELS = [
    # Its gate sees all neurons at once, yet the sparsity is what this package is for.
    Model("JAX", "Gemma 3n", "forward", _statistical, (
        *_ffns("statistical_topk", gated=True), _HEAD), linears=14, predicted=False),
    Model("JAX", "FFN trained with a top-k", "forward", _explicit, (
        *_ffns("topk", F), _HEAD), linears=12, predicted=False),
    Model("JAX", "int8 weights, dequantized", "forward",
          lambda dtype: _quantized(dtype, _dequantized), (*_SILU, _INT8), linears=8),
    Model("JAX", "int8 weights, scaled after", "forward",
          lambda dtype: _quantized(dtype, _scaled_after), (
        *(ffn(f"params/layers/{i}/w_down/q", D, G, "silu", gated=True)
          for i in (0, 1)),
        head("params/lm_head/q", D, V),
    ), linears=8),
    # Rounding to 8 bits is part of what happens to each neuron.
    Model("JAX", "int8 by int8, static ranges", "forward",
          lambda dtype: _quantized(dtype, _static),
          (*_ffns("custom", name="w_down/q", gated=True), _INT8), linears=8),
    # The range of the hidden activations is that of the greatest.
    Model("JAX", "int8 by int8, dynamic ranges", "forward",
          lambda dtype: _quantized(dtype, _dynamic), (_INT8,), linears=8),
    Model("JAX", "RWKV", "forward", _rwkv, (*_ffns("relu2", F), _HEAD), linears=10),
    Model("JAX", "Mamba", "forward", _mamba, (_HEAD,), linears=6),
    Model("JAX", "gMLP", "forward", _gmlp, (_HEAD,), linears=6),
]  # fmt: skip
