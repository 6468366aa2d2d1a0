"""Causal language models built with Flax Linen: GPT-2, OPT, Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from tests.zoo.linen_kit import Attention, RMSNorm, cache_of, filled, forward, params_of
from tests.zoo.model import Built, Model, ffn, head

D, F, G, V, T, CACHE, STEPS = 32, 128, 96, 256, 5, 8, 3
TOKENS = jnp.arange(3, 3 + T)[None] * 7
POSITIONS = jnp.arange(T)[None]


class Conv1D(nn.Module):
    """A dense layer whose kernel is stored the other way round, as GPT-2's checkpoints have it."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.normal(0.02), (self.features,))
        kernel = jnp.asarray(kernel.transpose(), self.dtype)
        y = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return y + jnp.asarray(bias, self.dtype)


class GPT2MLP(nn.Module):
    dtype: Any

    def setup(self) -> None:
        self.c_fc = Conv1D(F, self.dtype)
        self.c_proj = Conv1D(D, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(nn.gelu(self.c_fc(x), approximate=True))


class GPT2Block(nn.Module):
    dtype: Any

    def setup(self) -> None:
        self.ln_1 = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        self.attn = Attention(
            dtype=self.dtype, c_attn=Conv1D(3 * D, self.dtype), c_proj=Conv1D(D, self.dtype)
        )
        self.ln_2 = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        self.mlp = GPT2MLP(self.dtype)

    def __call__(self, x: jax.Array, positions: jax.Array, init_cache: bool) -> jax.Array:
        x = x + self.attn(self.ln_1(x), positions, init_cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    dtype: Any

    def setup(self) -> None:
        self.wte = nn.Embed(V, D, dtype=self.dtype)
        self.wpe = nn.Embed(CACHE, D, dtype=self.dtype)
        self.h = [GPT2Block(self.dtype) for _ in range(2)]
        self.ln_f = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, init_cache: bool = False
    ) -> jax.Array:
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.h:
            x = block(x, positions, init_cache)
        return self.wte.attend(self.ln_f(x))


class OPTLayer(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, init_cache: bool) -> jax.Array:
        y = nn.LayerNorm(dtype=self.dtype, name="self_attn_layer_norm")(x)
        x = x + Attention(dtype=self.dtype, bias=True, name="self_attn")(y, positions, init_cache)
        shape = x.shape
        x = x.reshape(-1, D)
        y = nn.LayerNorm(dtype=self.dtype, name="final_layer_norm")(x)
        y = nn.relu(nn.Dense(F, dtype=self.dtype, name="fc1")(y))
        y = nn.Dense(D, dtype=self.dtype, name="fc2")(y)
        return (x + y).reshape(shape)


class OPT(nn.Module):
    dtype: Any

    def setup(self) -> None:
        self.embed_tokens = nn.Embed(V, D)
        self.embed_positions = nn.Embed(CACHE + 2, D)
        self.layers = [OPTLayer(self.dtype) for _ in range(2)]
        self.final_layer_norm = nn.LayerNorm(dtype=self.dtype)
        self.lm_head = nn.Dense(V, use_bias=False, dtype=self.dtype, parent=None)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, init_cache: bool = False
    ) -> jax.Array:
        x = self.embed_tokens(tokens) + self.embed_positions(positions + 2)
        x = x.astype(self.dtype)
        for layer in self.layers:
            x = layer(x, positions, init_cache)
        kernel = self.embed_tokens.variables["params"]["embedding"].T
        return self.lm_head.apply({"params": {"kernel": kernel}}, self.final_layer_norm(x))


class LlamaMLP(nn.Module):
    dtype: Any

    def setup(self) -> None:
        dense = {"use_bias": False, "dtype": self.dtype}
        self.gate_proj = nn.Dense(G, **dense)
        self.down_proj = nn.Dense(D, **dense)
        self.up_proj = nn.Dense(G, **dense)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.up_proj(x) * nn.silu(self.gate_proj(x)))


class LlamaLayer(nn.Module):
    """Returns a pair, so that `nn.scan` can go over it."""

    dtype: Any

    def setup(self) -> None:
        self.input_layernorm = RMSNorm()
        self.self_attn = Attention(dtype=self.dtype, kv_heads=2, rope=True)
        self.post_attention_layernorm = RMSNorm()
        self.mlp = LlamaMLP(self.dtype)

    def __call__(
        self, x: jax.Array, positions: jax.Array, init_cache: bool
    ) -> tuple[jax.Array, None]:
        x = x + self.self_attn(self.input_layernorm(x), positions, init_cache)
        return x + self.mlp(self.post_attention_layernorm(x)), None


class Llama(nn.Module):
    dtype: Any
    scanned: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, init_cache: bool = False
    ) -> jax.Array:
        x = nn.Embed(V, D, dtype=self.dtype, name="embed_tokens")(tokens)
        if self.scanned:
            layers = nn.scan(
                LlamaLayer,
                variable_axes={"params": 0, "cache": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=3,
            )
            x, _ = layers(self.dtype, name="layers")(x, positions, init_cache)
        else:
            for i in range(2):
                x, _ = LlamaLayer(self.dtype, name=f"layers_{i}")(x, positions, init_cache)
        x = RMSNorm(name="norm")(x)
        return nn.Dense(V, use_bias=False, dtype=self.dtype, name="lm_head")(x)


class ScannedLlama(Llama):
    scanned = True


def _step(model: nn.Module) -> Callable[..., tuple[jax.Array, Any]]:
    def step(params: Any, token: jax.Array, position: jax.Array, cache: Any) -> Any:
        variables = {"params": params, "cache": cache}
        logits, new = model.apply(variables, token, position, mutable=["cache"])
        return logits[:, -1], new["cache"]

    return step


def _decode(make: Callable[[Any], nn.Module]) -> Callable[[Any], Built]:
    def build(dtype: Any) -> Built:
        model = make(dtype)
        cache = filled(cache_of(model, CACHE, init_cache=True), 4)
        args = (jnp.array([[17]]), jnp.array([[4]]), cache)
        return Built(_step(model), params_of(model, dtype, TOKENS, POSITIONS), args)

    return build


def _gpt2_generate(dtype: Any) -> Built:
    """Greedy search: the prompt in one go, then a while loop until all have ended."""
    model = GPT2(dtype)
    step = _step(model)

    def generate(params: Any, prompt: jax.Array, cache: Any) -> jax.Array:
        batch, length = prompt.shape
        sequences = jnp.zeros((batch, CACHE), jnp.int32)
        sequences = lax.dynamic_update_slice(sequences, prompt, (0, 0))

        def body(state: Any) -> Any:
            at, sequences, running, position, ended, cache = state
            logits, cache = step(params, running, position, cache)
            token = jnp.argmax(logits, axis=-1) * ~ended
            ended = ended | (token == 2)
            sequences = lax.dynamic_update_slice(sequences, token[:, None], (0, at))
            return at + 1, sequences, token[:, None], position[:, -1:] + 1, ended, cache

        def going(state: Any) -> jax.Array:
            return ~((state[0] == CACHE) | jnp.all(state[4]))

        positions = jnp.broadcast_to(jnp.arange(length), prompt.shape)
        ended = jnp.zeros(batch, bool)
        state = body((length, sequences, prompt, positions, ended, cache))
        return lax.while_loop(going, body, state)[1]

    cache = cache_of(model, CACHE, init_cache=True)
    return Built(generate, params_of(model, dtype, TOKENS, POSITIONS), (TOKENS, cache))


def _llama_generate(dtype: Any) -> Built:
    """Samples with a temperature among the 40 likeliest tokens, a fixed number of steps."""
    model = ScannedLlama(dtype)
    step = _step(model)

    def generate(params: Any, token: jax.Array, cache: Any, key: jax.Array) -> jax.Array:
        def body(carry: Any, key: jax.Array) -> Any:
            token, position, cache = carry
            logits, cache = step(params, token, position, cache)
            logits = logits.astype(jnp.float32) / 0.7
            kept = lax.top_k(logits, 40)[0][..., -1:]
            logits = jnp.where(logits < kept, -jnp.inf, logits)
            token = jax.random.categorical(key, logits)
            return (token[:, None], position + 1, cache), token

        carry = (token, jnp.array([[4]]), cache)
        return lax.scan(body, carry, jax.random.split(key, STEPS))[1]

    cache = filled(cache_of(model, CACHE, init_cache=True), 4)
    args = (jnp.array([[17]]), cache, jax.random.key(3))
    return Built(generate, params_of(model, dtype, TOKENS, POSITIONS), args)


def _gpt2_sites(which: str = "") -> tuple[Any, ...]:
    blocks = tuple(
        ffn(f"GPT2/h_{i}/mlp:params/h_{i}/mlp/c_proj/kernel{which}", D, F, "gelu_tanh")
        for i in range(2)
    )
    return (*blocks, head(f"GPT2/wte.attend:params/wte/embedding{which}", D, V))


MODELS = [
    Model("Linen", "GPT-2", "forward", forward(GPT2, TOKENS, POSITIONS), _gpt2_sites(), linears=4),
    Model("Linen", "GPT-2", "decode", _decode(GPT2), _gpt2_sites(), linears=4),
    Model(
        "Linen", "GPT-2", "generate", _gpt2_generate,
        (*_gpt2_sites("#1"), *_gpt2_sites("#2")), discrete=True, linears=8,
    ),
    Model("Linen", "OPT", "decode", _decode(OPT), (
        *(ffn(f"OPT/layers_{i}:params/layers_{i}/fc2/kernel", D, F, "relu") for i in range(2)),
        head("OPT/lm_head:params/embed_tokens/embedding", D, V),
    ), linears=8),
    Model("Linen", "Llama (scanned layers)", "forward", forward(ScannedLlama, TOKENS, POSITIONS), (
        ffn("ScannedLlama/layers/mlp:params/layers/mlp", D, G, "silu", gated=True, repeats=3),
        head("ScannedLlama/lm_head:params/lm_head/kernel", D, V),
    ), linears=4),
    Model("Linen", "Llama", "decode", _decode(Llama), (
        *(ffn(f"Llama/layers_{i}/mlp:params/layers_{i}/mlp", D, G, "silu", gated=True)
          for i in range(2)),
        head("Llama/lm_head:params/lm_head/kernel", D, V),
    ), linears=8),
    Model("Linen", "Llama (scanned layers)", "generate", _llama_generate, (
        ffn("ScannedLlama/layers/mlp:params/layers/mlp", D, G, "silu", gated=True,
            repeats=3 * STEPS),
        head("ScannedLlama/lm_head:params/lm_head/kernel", D, V, repeats=STEPS),
    ), discrete=True, linears=4),
]  # fmt: skip
