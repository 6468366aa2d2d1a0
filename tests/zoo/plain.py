"""Models written in plain JAX: functions of nested dictionaries of arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.zoo.model import Built, Model, ffn, head

__all__ = [
    "MODELS", "attention", "layers_of", "model_of", "norm", "normal", "swiglu", "trunk",
]  # fmt: skip

D, F, G, V, T, S = 32, 128, 96, 256, 4, 8
HEADS, H = 4, 8


def normal(seed: int, *shape: int, dtype: Any) -> jax.Array:
    """A product with a matrix of these numbers keeps the scale of its input."""
    numbers = np.random.default_rng(seed).normal(size=shape)
    size = shape[-2] if len(shape) > 1 else 1
    return jax.device_put((numbers / size**0.5).astype(jnp.dtype(dtype)))


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates pairs of [..., tokens, heads, size]."""
    rate = 1e4 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = positions[:, None, None] * rate
    a, b = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30)).astype(v.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v).reshape(*q.shape[:-2], -1)


def attention(w: Any, x: jax.Array, causal: bool = True, memory: Any = None) -> jax.Array:
    """Without a cache; with `memory`, across to it."""
    source = x if memory is None else memory
    q, k, v = (
        (a @ w[name]).reshape(*a.shape[:-1], HEADS, H)
        for name, a in (("wq", x), ("wk", source), ("wv", source))
    )
    full = jnp.ones((x.shape[-2], source.shape[-2]), bool)
    return attend(q, k, v, jnp.tril(full) if causal else full) @ w["wo"]


def layers_of(
    seed: int, dtype: Any, stack: tuple[int, ...] = (), width: int = G, gated: bool = True
) -> dict[str, jax.Array]:
    """The weights of one layer, or of a stack of them."""
    shapes = {"wq": (D, D), "wk": (D, D), "wv": (D, D), "wo": (D, D)}
    shapes |= {"w_up": (D, width), "w_down": (width, D)}
    if gated:
        shapes["w_gate"] = (D, width)
    weights = {
        name: normal(seed + i, *stack, *shape, dtype=dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }
    ones = jnp.ones((*stack, D), dtype)
    return weights | {"attention_norm": ones, "ffn_norm": 0.9 * ones}


def model_of(dtype: Any, stack: tuple[int, ...] = (3,), **kw: Any) -> dict[str, Any]:
    return {
        "embed": normal(90, V, D, dtype=dtype), "layers": layers_of(0, dtype, stack, **kw),
        "norm": jnp.ones(D, dtype), "lm_head": normal(91, D, V, dtype=dtype),
    }  # fmt: skip


def swiglu(w: Any, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ w["w_gate"]) * (x @ w["w_up"])) @ w["w_down"]


def decode(params: Any, tokens: jax.Array, cache: Any, start: Any) -> tuple[jax.Array, Any]:
    """Some tokens [batch, tokens] behind `start` others: the last one's logits, and the cache."""
    positions = start + jnp.arange(tokens.shape[1])
    mask = jnp.arange(S) <= positions[:, None]

    def layer(x, scanned):
        w, k_cache, v_cache = scanned
        h = norm(x, w["attention_norm"])
        q, k, v = ((h @ w[n]).reshape(*h.shape[:-1], HEADS, H) for n in ("wq", "wk", "wv"))
        k = jax.lax.dynamic_update_slice(k_cache, rope(k, positions), (0, start, 0, 0))
        v = jax.lax.dynamic_update_slice(v_cache, v, (0, start, 0, 0))
        x = x + attend(rope(q, positions), k, v, mask) @ w["wo"]
        return x + swiglu(w, norm(x, w["ffn_norm"])), (k, v)

    x, cache = jax.lax.scan(layer, params["embed"][tokens], (params["layers"], *cache))
    return norm(x[:, -1], params["norm"]) @ params["lm_head"], cache


def _cache(batch: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    empty = jnp.zeros((3, batch, S, HEADS, H), dtype)
    return empty, empty


def _decode(dtype: Any) -> Built:
    params = model_of(dtype)
    tokens = jnp.array([[5, 17, 99, 200]])
    _, cache = decode(params, tokens, _cache(1, dtype), 0)
    return Built(decode, params, (tokens[:, :1], cache, jnp.int32(4)))


def _generate(dtype: Any) -> Built:
    """Greedy, until the end token or a full cache."""

    def generate(params, tokens):
        batch, length = tokens.shape
        logits, cache = decode(params, tokens, _cache(batch, dtype), 0)
        first = jnp.argmax(logits, axis=-1)
        out = jnp.zeros((batch, S), jnp.int32).at[:, 0].set(first)

        def unfinished(carry):
            position, _, _, done = carry
            return (position < S) & ~done.all()

        def step(carry):
            position, out, cache, done = carry
            token = jax.lax.dynamic_slice(out, (0, position - length), (batch, 1))
            logits, cache = decode(params, token, cache, position)
            following = jnp.where(done, 0, jnp.argmax(logits, axis=-1))
            out = out.at[:, position - length + 1].set(following)
            return position + 1, out, cache, done | (following == 0)

        return jax.lax.while_loop(unfinished, step, (length, out, cache, first == 0))[1]

    return Built(generate, model_of(dtype), (jnp.array([[5, 17, 99, 200]]),))


def _beams(dtype: Any) -> Built:
    """Three beams, each the batch of one prompt; their caches follow them."""
    beams = 3

    def search(params, tokens):
        prompt = jnp.repeat(tokens, beams, axis=0)
        logits, cache = decode(params, prompt, _cache(beams, dtype), 0)
        scores, token = jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32))[0], beams)

        def step(carry, position):
            token, scores, cache = carry
            logits, cache = decode(params, token[:, None], cache, position)
            total = scores[:, None] + jax.nn.log_softmax(logits.astype(jnp.float32))
            scores, flat = jax.lax.top_k(total.reshape(-1), beams)
            parent, token = flat // V, flat % V
            cache = jax.tree.map(lambda c: c[:, parent], cache)
            return (token, scores, cache), (token, parent)

        carry = (token, scores, cache)
        (_, scores, _), path = jax.lax.scan(step, carry, jnp.arange(4, 7))
        return token, path, scores

    return Built(search, model_of(dtype), (jnp.array([[5, 17, 99, 200]]),))


def _palm(dtype: Any) -> Built:
    """Attention and FFN in parallel, their five input products fused into one."""
    sizes = (HEADS * H, H, H, G, G)
    params = {
        "embed": normal(90, V, D, dtype=dtype), "norm": jnp.ones(D, dtype),
        "layers": [
            {"norm": jnp.ones(D, dtype), "wi": normal(i, D, sum(sizes), dtype=dtype),
             "attn_wo": normal(i + 2, D, D, dtype=dtype),
             "ff_wo": normal(i + 4, G, D, dtype=dtype)}
            for i in (0, 1)
        ],
    }  # fmt: skip
    splits = [sum(sizes[: i + 1]) for i in range(4)]

    def forward(params, tokens):
        x = params["embed"][tokens]
        positions = jnp.arange(tokens.shape[1])
        for w in params["layers"]:
            fused = norm(x, w["norm"]) @ w["wi"]
            q, k, v, up, gate = jnp.split(fused, splits, axis=-1)
            q = rope(q.reshape(*q.shape[:-1], HEADS, H), positions)
            k = jnp.broadcast_to(rope(k[..., None, :], positions), q.shape)
            v = jnp.broadcast_to(v[..., None, :], q.shape)
            mixed = attend(q, k, v, positions <= positions[:, None])
            x = x + mixed @ w["attn_wo"] + (up * jax.nn.silu(gate)) @ w["ff_wo"]
        return norm(x, params["norm"]) @ params["embed"].T

    return Built(forward, params, (jnp.arange(T)[None],))


def trunk(params: Any, tokens: jax.Array) -> jax.Array:
    """The layers scanned, without positions."""

    def layer(x, w):
        x = x + attention(w, norm(x, w["attention_norm"]))
        return x + swiglu(w, norm(x, w["ffn_norm"])), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return norm(x, params["norm"])


_SCANNED = functools.partial(ffn, activation="silu", gated=True, d_model=D, width=G)
_FFN = _SCANNED("params/layers/w_down", repeats=3)
_HEAD = head("params/lm_head", D, V)

MODELS = [
    Model("JAX", "Llama, layers scanned", "decode", _decode, (_FFN, _HEAD), linears=4),
    Model("JAX", "Llama, layers scanned", "generate", _generate, (
        _SCANNED("params/layers/w_down#1", repeats=3),
        _SCANNED("params/layers/w_down#2", repeats=3),
        head("params/lm_head#1", D, V), head("params/lm_head#2", D, V),
    ), discrete=True, linears=8),
    Model("JAX", "beam search", "generate", _beams, (
        _SCANNED("params/layers/w_down#1", repeats=3),
        _SCANNED("params/layers/w_down#2", repeats=9),
        head("params/lm_head#1", D, V), head("params/lm_head#2", D, V, repeats=3),
    ), discrete=True, linears=8),
    Model("JAX", "PaLM", "forward", _palm, (
        *(ffn(f"params/layers/{i}/ff_wo", D, G, "silu", gated=True) for i in (0, 1)),
        head("params/embed", D, V),
    ), linears=2),
]  # fmt: skip
