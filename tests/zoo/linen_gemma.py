"""Gemma built with Flax Linen: einsums, and both halves of the gate in one weight."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from tests.zoo.linen import CACHE, POSITIONS, TOKENS, D, G, V
from tests.zoo.linen_kit import RMSNorm, forward, params_of
from tests.zoo.model import Built, Model, ffn, head


class Einsum(nn.Module):
    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
        weight = self.param(self.weight_name, nn.initializers.normal(0.2), self.shape)
        return jnp.einsum(eqn, x, weight)


class GemmaFeedForward(nn.Module):
    transposed: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, eqn = ((2, G, D), "...F,NHF->...NH") if self.transposed else (
            (2, D, G), "...F,NFH->...NH")  # fmt: skip
        gating = Einsum(shape, "gating_einsum")
        nn.share_scope(self, gating)
        gate = gating(eqn, x)
        hidden = nn.gelu(gate[..., 0, :]) * gate[..., 1, :]
        linear = Einsum((G, D), "linear")
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", hidden)


class GemmaAttention(nn.Module):
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: dict[str, jax.Array] | None
    ) -> tuple[dict[str, jax.Array] | None, jax.Array]:
        q = Einsum((self.heads, D, self.head_dim), name="q_einsum")("BTD,NDH->BTNH", x)
        shape = (2, self.kv_heads, D, self.head_dim)
        k, v = Einsum(shape, name="kv_einsum")("BSD,CKDH->CBSKH", x)
        if cache is not None:
            start = (0, cache["end_index"][0], 0, 0)
            k = lax.dynamic_update_slice(cache["k"], k, start)
            v = lax.dynamic_update_slice(cache["v"], v, start)
            cache = {"k": k, "v": v, "end_index": cache["end_index"] + x.shape[1]}
        b, t = x.shape[:2]
        q = q.reshape(b, t, self.kv_heads, -1, self.head_dim) * self.head_dim**-0.5
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", q, k)
        logits = jnp.tanh(logits / 50.0) * 50.0
        mask = jnp.arange(k.shape[1]) <= positions[:, :, None]
        logits = jnp.where(mask[:, :, None, None], logits, -2.3819763e38)
        probs = jax.nn.softmax(logits, axis=-1).astype(k.dtype)
        out = jnp.einsum("BTKGS,BSKH->BTKGH", probs, v).reshape(b, t, self.heads, self.head_dim)
        out = Einsum((self.heads, self.head_dim, D), name="attn_vec_einsum")("BTNH,NHD->BTD", out)
        return cache, out


class GemmaBlock(nn.Module):
    transposed: bool

    def setup(self) -> None:
        self.pre_attention_norm = RMSNorm(offset=1)
        self.attn = GemmaAttention()
        self.post_attention_norm = RMSNorm(offset=1)
        self.pre_ffw_norm = RMSNorm(offset=1)
        self.mlp = GemmaFeedForward(self.transposed)
        self.post_ffw_norm = RMSNorm(offset=1)

    def __call__(self, x: jax.Array, positions: jax.Array, cache: Any) -> tuple[Any, jax.Array]:
        cache, y = self.attn(self.pre_attention_norm(x), positions, cache)
        x = x + self.post_attention_norm(y)
        return cache, x + self.post_ffw_norm(self.mlp(self.pre_ffw_norm(x)))


class Gemma(nn.Module):
    dtype: Any
    transposed: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: dict[str, Any] | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        embedder = self.param("input_embedding", nn.initializers.normal(0.2), (V, D))
        x = embedder[(tokens,)]
        x *= jnp.sqrt(D).astype(x.dtype)
        caches = {}
        for i in range(2):
            name = f"layer_{i}"
            block = GemmaBlock(self.transposed, name=name)
            caches[name], x = block(x, positions, cache[name] if cache else None)
        logits = jnp.dot(RMSNorm(offset=1, name="final_norm")(x), embedder.T)
        return jnp.tanh(logits / 30.0) * 30.0, caches


class GemmaTransposed(Gemma):
    transposed = True


def _gemma_decode(dtype: Any) -> Built:
    model = GemmaTransposed(dtype)
    shape = (1, CACHE, 2, 8)
    rng = np.random.default_rng(5)
    cache = {
        f"layer_{i}": {
            "k": jnp.asarray(rng.normal(size=shape), dtype),
            "v": jnp.asarray(rng.normal(size=shape), dtype),
            "end_index": jnp.array([4]),
        }
        for i in range(2)
    }

    def fn(params: Any, token: jax.Array, position: jax.Array, cache: Any) -> Any:
        logits, cache = model.apply({"params": params}, token, position, cache)
        return logits[:, -1], cache

    args = (jnp.array([[17]]), jnp.array([[4]]), cache)
    return Built(fn, params_of(model, dtype, TOKENS, POSITIONS), args)


def _gemma_sites(model: str) -> tuple[Any, ...]:
    blocks = (
        ffn(f"{model}/layer_{i}/mlp:params/layer_{i}/mlp", D, G, "gelu_tanh", gated=True)
        for i in range(2)
    )
    return (*blocks, head(f"{model}:params/input_embedding", D, V))


MODELS = [
    Model("Linen", "Gemma", "forward", forward(Gemma, TOKENS, POSITIONS), _gemma_sites("Gemma"),
          linears=6),
    Model("Linen", "Gemma (transposed gate)", "decode", _gemma_decode,
          _gemma_sites("GemmaTransposed"), linears=6),
]  # fmt: skip
