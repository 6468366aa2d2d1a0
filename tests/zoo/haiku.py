"""Models built with Haiku."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from tests.zoo.linen_kit import drawn
from tests.zoo.model import Built, Expected, Model, ffn, head

D, F, V, T, CACHE, HEADS = 32, 128, 256, 5, 8, 4
TOKENS = jnp.arange(3, 3 + T)[None] * 7


def built(fn: Callable[..., Any], dtype: Any, *args: Any) -> Built:
    model = hk.without_apply_rng(hk.transform(fn))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    return Built(model.apply, drawn(shapes, dtype), args)


def norm(x: jax.Array) -> jax.Array:
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)


class LanguageModel(hk.Module):
    """Haiku's example of a transformer."""

    def __call__(self, tokens: jax.Array, key: jax.Array) -> jax.Array:
        table = hk.Embed(V, D)
        init = hk.initializers.TruncatedNormal(0.02)
        positions = hk.get_parameter("positional_embeddings", [tokens.shape[1], D], init=init)
        h = table(tokens) + positions.astype(table.embeddings.dtype)
        mask = (tokens != 0)[:, None, None, :] * np.tril(np.ones((1, 1, T, T)))
        for dropout_key in jax.random.split(key, 2):
            x = norm(h)
            init = hk.initializers.VarianceScaling()
            attention = hk.MultiHeadAttention(HEADS, D // HEADS, model_size=D, w_init=init)
            h = h + attention(x, x, x, mask=mask)
            dense = hk.Sequential([hk.Linear(F), jax.nn.gelu, hk.Linear(D)])
            h = h + hk.dropout(dropout_key, 0.1, dense(norm(h)))
        return hk.Linear(V)(norm(h))


def every_two(x: jax.Array) -> jax.Array:
    x = jnp.stack((-x[..., 1::2], x[..., ::2]), axis=-1)
    return x.reshape(*x.shape[:-2], -1)


def rotary(x: jax.Array) -> jax.Array:
    """Neighbours against each other, positions counted from the first row."""
    frequencies = 1.0 / 10000 ** (np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = np.repeat(np.arange(x.shape[0])[:, None] * frequencies, 2, axis=-1)[:, None]
    angles = angles.astype(np.float32)
    return (x * np.cos(angles) + every_two(x) * np.sin(angles)).astype(x.dtype)


class GPTJLayer(hk.Module):
    """Attention and the FFN read the same norm and are added together."""

    def __call__(self, x: jax.Array, state: dict[str, jax.Array] | None = None) -> Any:
        x = norm(x)
        linear = functools.partial(hk.Linear, with_bias=False)
        q, v, k = (
            linear(D, name=n)(x).reshape(-1, HEADS, D // HEADS) for n in ("q", "v", "k")
        )  # fmt: skip
        if state is not None:  # the newest at the end
            v = jnp.concatenate((state["v"], v))[1:]
            k = jnp.concatenate((state["k"], k))[1:]
            decoded = state["tokens_decoded"] + 1
            state = {"tokens_decoded": decoded, "k": k, "v": v}
            bias = -1e10 * (jnp.arange(k.shape[0]) < k.shape[0] - decoded)
        else:
            bias = -1e10 * (1.0 - np.tril(np.ones((x.shape[0], x.shape[0]))))
        rotated = rotary(jnp.concatenate((jnp.zeros_like(k[q.shape[0] :]), q)))[-q.shape[0] :]
        logits = jnp.einsum("thd,Thd->htT", rotated, rotary(k)) / np.sqrt(D // HEADS).astype(
            k.dtype
        )
        weights = jax.nn.softmax(logits + bias.astype(k.dtype))
        attended = jnp.einsum("htT,Thd->thd", weights, v).reshape(-1, D)
        hidden = jax.nn.gelu(hk.Linear(F, name="dense_proj")(x))
        out = linear(D, name="o")(attended) + hk.Linear(D, name="dense_proj_o")(hidden)
        return out, state


def gptj(dtype: Any, x: jax.Array, states: Any = None) -> Any:
    """One sequence; tokens become one-hot rows of a matrix product."""
    linear = hk.Linear(D, name="embed")
    x = linear(jax.nn.one_hot(x, V, dtype=dtype))
    new = []
    for i in range(2):
        out, state = GPTJLayer(name=f"layer_{i}")(x, None if states is None else states[i])
        x = x + out
        new.append(state)
    logits = hk.Linear(V, name="proj")(norm(x))
    return logits if states is None else (logits, new)


def _gptj_forward(dtype: Any) -> Built:
    return built(jax.vmap(functools.partial(gptj, dtype)), dtype, TOKENS)


def _gptj_decode(dtype: Any) -> Built:
    rng = np.random.default_rng(2)
    shape = (CACHE, HEADS, D // HEADS)
    states = [
        {n: jnp.asarray(rng.normal(size=shape), dtype) for n in ("k", "v")}
        | {"tokens_decoded": jnp.uint32(4)}
        for _ in range(2)
    ]
    return built(functools.partial(gptj, dtype), dtype, jnp.array([17]), states)


class Linear(hk.Module):
    """Grok's: no bias, the weight in float32, cast to the dtype of its input."""

    def __init__(self, size: int, name: str | None = None):
        super().__init__(name)
        self.size = size

    def __call__(self, x: jax.Array) -> jax.Array:
        init = hk.initializers.VarianceScaling()
        w = hk.get_parameter("w", [x.shape[-1], self.size], jnp.float32, init=init)
        return jnp.dot(x, w.astype(x.dtype))


def rms(x: jax.Array) -> jax.Array:
    scale = hk.RMSNorm(axis=-1)
    return scale(x.astype(jnp.float32)).astype(x.dtype)


def dense_block(x: jax.Array) -> jax.Array:
    value = Linear(F, name="linear_v")(x)
    hidden = jax.nn.gelu(Linear(F, name="linear")(x)) * value
    return Linear(D, name="linear_1")(hidden)


class MoELayer(hk.Module):
    """All experts for each token and choice, picked by one-hot rows behind each product."""

    experts: int = 4

    def __call__(self, x: jax.Array) -> jax.Array:
        init = hk.initializers.VarianceScaling()
        router = hk.get_parameter("router", [D, self.experts], jnp.float32, init=init)
        probs = jax.nn.softmax(jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32)))
        gate, index = jax.lax.top_k(probs, 2)
        rows = jnp.repeat(x.reshape(-1, D), 2, axis=0)
        initialise = jax.vmap(hk.transform(dense_block).init)
        params = hk.experimental.transparent_lift(initialise)(
            jax.random.split(jax.random.key(1), self.experts),
            jnp.zeros((self.experts, 1, 1, D)),
        )
        chosen = jax.nn.one_hot(index.reshape(-1), self.experts, axis=0, dtype=x.dtype)

        def product(rows: jax.Array, name: str) -> jax.Array:
            each = jnp.einsum("mk,bkn->bmn", rows, params[name]["w"].astype(x.dtype))
            return jnp.einsum("bm,bmn->mn", chosen, each)

        hidden = product(rows, "linear_v") * jax.nn.gelu(product(rows, "linear"))
        out = product(hidden, "linear_1").reshape(*x.shape[:2], 2, D)
        return jnp.sum(gate[..., None].astype(x.dtype) * out, axis=2)


def grok(tokens: jax.Array, steps: jax.Array, memory: Any) -> Any:
    """A decode step with two key-value heads, capped scores, and norms on both sides."""
    embed = hk.Embed(V, D, name="in_out_embed")
    x = embed(tokens).astype(memory[0][0].dtype) * 5.65
    new = []
    for i in range(2):
        y = rms(x)
        with hk.experimental.name_scope(f"decoder_layer_{i}"):
            q = Linear(D, name=f"query_{i}")(y).reshape(*y.shape[:2], 2, 2, 8)
            k, v = (Linear(16, name=f"{n}_{i}")(y).reshape(*y.shape[:2], 2, 8) for n in "kv")
            update = jax.vmap(
                lambda m, start, u: jax.lax.dynamic_update_slice_in_dim(m, u, start, 0)
            )
            k, v = (update(m, steps, u) for m, u in zip(memory[i], (k, v), strict=True))
            new.append((k, v))
            scores = jnp.einsum("btHhd,bTHd->bHhtT", q, k).astype(jnp.float32) * 0.35
            scores = 30.0 * jnp.tanh(scores / 30.0)
            seen = jnp.arange(k.shape[1]) <= steps[:, None]
            weights = jax.nn.softmax(jnp.where(seen[:, None, None, None], scores, -1e30))
            y = jnp.einsum("bHhtT,bTHd->btHhd", weights.astype(x.dtype), v)
            x = x + rms(Linear(D, name=f"o_{i}")(y.reshape(x.shape)))
            x = x + rms(MoELayer(name=f"moe_{i}")(rms(x)))
    logits = jnp.dot(rms(x), embed.embeddings.T.astype(x.dtype))
    return logits[:, -1] * 0.57, new


def _grok(dtype: Any) -> Built:
    rng = np.random.default_rng(2)
    memory = [
        tuple(jnp.asarray(rng.normal(size=(1, CACHE, 2, 8)), dtype) for _ in "kv") for _ in range(2)
    ]
    return built(grok, dtype, jnp.array([[17]]), jnp.array([4]), memory)


def lstm(tokens: jax.Array) -> jax.Array:
    """Haiku's character model: the states of every step, then the vocabulary."""
    core = hk.DeepRNN([hk.Embed(V, D), hk.LSTM(D), jax.nn.relu, hk.LSTM(D)])
    states = core.initial_state(tokens.shape[1])
    states = jax.tree.map(lambda s: s.astype(core.layers[0].embeddings.dtype), states)
    outputs, _ = hk.dynamic_unroll(core, tokens, states)
    return hk.Linear(V)(outputs)


def vae(image: jax.Array, noise: jax.Array) -> tuple[jax.Array, ...]:
    x = jax.nn.relu(hk.Linear(F, name="encoder_linear")(hk.Flatten()(image)))
    mean, spread = hk.Linear(8, name="mean")(x), hk.Linear(8, name="log_stddev")(x)
    z = jax.nn.relu(hk.Linear(F, name="decoder_linear")(mean + noise * jnp.exp(spread)))
    logits = hk.Linear(256, name="decoder_out")(z)
    return logits.reshape(image.shape), mean, spread


def classifier(image: jax.Array) -> jax.Array:
    """Haiku's MNIST example: layers in a row that do not return to a size before."""
    return hk.Sequential([hk.Flatten(), hk.nets.MLP([120, 100, 10])])(image)


def _image(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[Any], Built]:
    def build(dtype: Any) -> Built:
        waves = (np.sin(np.arange(np.prod(s)) ** 1.5).reshape(s) for s in shapes)
        return built(fn, dtype, *(jnp.asarray(wave, dtype) for wave in waves))

    return build


def _blocks(name: str, *fields: Any, **more: Any) -> tuple[Expected, ...]:
    return tuple(ffn(name.format(i, i), *fields, **more) for i in range(2))


MODELS = [
    Model("Haiku", "transformer LM (dropout)", "forward",
          lambda dtype: built(lambda *a: LanguageModel()(*a), dtype, TOKENS, jax.random.key(3)), (
        ffn("language_model/sequential:params/language_model/linear_1/w", D, F, "gelu_tanh"),
        ffn("language_model/sequential_1:params/language_model/linear_3/w", D, F, "gelu_tanh"),
        head("language_model/linear_4:params/language_model/linear_4/w", D, V),
    ), linears=8),
    Model("Haiku", "GPT-J", "forward", _gptj_forward, (
        *_blocks("layer_{}:params/layer_{}/dense_proj_o/w", D, F, "gelu_tanh"),
        head("proj:params/proj/w", D, V),
    ), linears=9),
    Model("Haiku", "GPT-J", "decode", _gptj_decode, (
        *_blocks("layer_{}:params/layer_{}/dense_proj_o/w", D, F, "gelu_tanh"),
        head("proj:params/proj/w", D, V),
    ), linears=9),
    # Its experts' results are summed up in their last product.
    Model("Haiku", "Grok", "decode", _grok, (
        head("params/in_out_embed/embeddings", D, V),
    ), linears=16),
    Model("Haiku", "LSTM LM", "forward", lambda dtype: built(lstm, dtype, TOKENS.T), (
        head("linear:params/linear/w", D, V),
    ), linears=2),
    Model("Haiku", "VAE", "forward", _image(vae, (1, 16, 16), (1, 8)), linears=5),
    Model("Haiku", "MLP classifier", "forward", _image(classifier, (1, 16, 16)), linears=3),
]  # fmt: skip
