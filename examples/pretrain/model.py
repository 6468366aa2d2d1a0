"""A small decoder-only transformer in plain JAX: functions over a dict of arrays.

    init(config, key)                           the parameters
    loss(config, params, tokens)                nats per token, over whole rows
    forward(config, params, tokens)             logits at every position
    prefill(config, params, tokens, cache)      read a prompt, remember its keys and values
    decode_step(config, params, token, cache)   one more token per sequence

Each layer is  x += attention(norm(x));  x += ffn(norm(x)).  The layers are stacked on a leading
axis and run under `lax.scan`. The FFN is one of two, of width f:

    relu2   relu(x @ w_up)² @ w_down
    gated   (relu(x @ w_gate) * (x @ w_up)) @ w_down

Nothing here selects a top-k: `hire_rewrite.transform` puts it into these functions from outside.
Letters in the einsums: b batch, s query position, t key position, n head, h element of a head.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..layers import rms_norm, rotate

Params = dict[str, Any]
Cache = dict[str, Array]
ARCHITECTURES = ("relu2", "gated")


@dataclass(frozen=True)
class Config:
    """Sizes of the model. Hashable, so it can also be a static argument of `jax.jit`."""

    architecture: str
    vocab: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


def init(config: Config, key: Array) -> Params:
    """Random parameters, all float32. With V = vocab, d = d_model, f = d_ff, L = layers:

    embed: [V, d]    head: [d, V]    final_norm: [d]
    layers: attn_norm, ffn_norm: [L, d]    wqkv: [L, d, 3, d]    wo: [L, d, d]
            w_up, w_gate (gated alone): [L, d, f]    w_down: [L, f, d]
    """
    d, f, n = config.d_model, config.d_ff, config.layers
    shapes = {"wqkv": (d, 3, d), "wo": (d, d), "w_up": (d, f), "w_down": (f, d)}
    if config.architecture == "gated":
        shapes["w_gate"] = (d, f)
    embed, head, *keys = jax.random.split(key, 2 + len(shapes))
    layers = {
        name: jax.random.normal(k, (n, *shape)) / math.sqrt(shape[0])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    for name in ("wo", "w_down"):  # what is added to x grows with the number of layers
        layers[name] = layers[name] / math.sqrt(2 * n)
    layers |= {"attn_norm": jnp.ones((n, d)), "ffn_norm": jnp.ones((n, d))}
    return {
        "embed": jax.random.normal(embed, (config.vocab, d)),
        "layers": layers,
        "final_norm": jnp.ones(d),
        "head": jax.random.normal(head, (d, config.vocab)) / math.sqrt(d),
    }


def init_cache(config: Config, batch: int, max_len: int) -> Cache:
    """An empty cache: k, v: [layers, batch, heads, max_len, head_dim] and pos: i32[]."""
    shape = (config.layers, batch, config.heads, max_len, config.head_dim)
    return {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "pos": jnp.int32(0)}


def loss(config: Config, params: Params, tokens: Array) -> Array:
    """Mean of -log p of each next token, f32[], in tokens: i32[batch, seq + 1]."""
    logits, targets = forward(config, params, tokens[:, :-1]), tokens[:, 1:]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def forward(config: Config, params: Params, tokens: Array) -> Array:
    """Logits: [batch, seq, vocab] at every position of tokens: i32[batch, seq]."""
    positions = jnp.arange(tokens.shape[1])
    mask = positions[:, None] >= positions

    def block(x: Array, layer: Params) -> tuple[Array, None]:
        q, k, v = _qkv(config, layer, x, positions)
        x = x + _attend(q, k, v, mask) @ layer["wo"]
        return x + _ffn(config, layer, x), None

    x, _ = lax.scan(block, params["embed"][tokens], params["layers"])
    return rms_norm(x, params["final_norm"], config.norm_eps) @ params["head"]


def prefill(config: Config, params: Params, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
    """Read tokens: i32[batch, seq]; return logits: [batch, vocab] after the last, and the cache."""
    x, cache = _read(config, params, tokens, cache)
    return x[:, -1] @ params["head"], cache


def decode_step(config: Config, params: Params, token: Array, cache: Cache) -> tuple[Array, Cache]:
    """Read token: i32[batch]; return logits: [batch, vocab] for the next one, and the cache."""
    return prefill(config, params, token[:, None], cache)


def _read(config: Config, params: Params, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
    """Append tokens: i32[batch, seq] to the cache; final hidden states x: [batch, seq, d_model]."""
    pos, max_len = cache["pos"], cache["k"].shape[3]
    positions = pos + jnp.arange(tokens.shape[1])
    mask = positions[:, None] >= jnp.arange(max_len)

    def block(carry: tuple[Array, Array, Array], scanned: tuple[Params, Array]) -> tuple[Any, None]:
        x, keys, values = carry
        layer, index = scanned
        q, k, v = _qkv(config, layer, x, positions)
        keys = lax.dynamic_update_slice(keys, k[None], (index, 0, 0, pos, 0))
        values = lax.dynamic_update_slice(values, v[None], (index, 0, 0, pos, 0))
        x = x + _attend(q, keys[index], values[index], mask) @ layer["wo"]
        return (x + _ffn(config, layer, x), keys, values), None

    carry = (params["embed"][tokens], cache["k"], cache["v"])
    scanned = (params["layers"], jnp.arange(config.layers))
    (x, keys, values), _ = lax.scan(block, carry, scanned)
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    return x, {"k": keys, "v": values, "pos": pos + tokens.shape[1]}


def _qkv(config: Config, layer: Params, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values [b, n, s, h] of x: [b, s, d_model]."""
    batch, seq, _ = x.shape
    x = rms_norm(x, layer["attn_norm"], config.norm_eps)
    fused = jnp.einsum("bsd,dke->kbse", x, layer["wqkv"])
    heads = fused.reshape(3, batch, seq, config.heads, config.head_dim)
    q, k, v = jnp.einsum("kbsnh->kbnsh", heads)
    return rotate(q, positions, config.rope_base), rotate(k, positions, config.rope_base), v


def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Mix v: [b, n, t, h] by the softmax of q: [b, n, s, h] on k: [b, n, t, h]: [b, s, d_model].

    mask: bool[s, t] is true where a query may look.
    """
    scores = jnp.einsum("bnsh,bnth->bnst", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bnst,bnth->bsnh", weights, v)
    return mixed.reshape(*mixed.shape[:2], -1)


def _ffn(config: Config, layer: Params, x: Array) -> Array:
    """The FFN of x: [b, s, d_model]."""
    x = rms_norm(x, layer["ffn_norm"], config.norm_eps)
    if config.architecture == "gated":
        return (jax.nn.relu(x @ layer["w_gate"]) * (x @ layer["w_up"])) @ layer["w_down"]
    return jnp.square(jax.nn.relu(x @ layer["w_up"])) @ layer["w_down"]
