"""Models built with Flax NNX: stacked layers, adapters, experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Built, Model, ffn, head
from tests.zoo.nnx import HEAD, Layer, qwen3, swiglu

D, F, V, T = 32, 96, 256, 4


class MoE(nnx.Module):
    """The tokens sorted by expert, and one ragged product for all experts."""

    def __init__(self, experts: int, chosen: int, *, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        kw = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.router = nnx.Linear(D, experts, **kw)
        self.gate_proj = nnx.Param(init(rngs.params(), (experts, D, F), dtype))
        self.up_proj = nnx.Param(init(rngs.params(), (experts, D, F), dtype))
        self.down_proj = nnx.Param(init(rngs.params(), (experts, F, D), dtype))
        self.chosen = chosen

    @jax.named_scope("moe")
    def __call__(self, x: jax.Array) -> jax.Array:
        scores = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(scores, self.chosen)
        weights = (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)
        flat = experts.reshape(-1)
        order = jnp.argsort(flat)
        rows = x.reshape(-1, D)[order // self.chosen]
        sizes = jnp.bincount(flat, length=self.gate_proj.shape[0])
        gate = jax.lax.ragged_dot(rows, self.gate_proj[...], sizes)
        up = jax.lax.ragged_dot(rows, self.up_proj[...], sizes)
        out = jax.lax.ragged_dot(nnx.silu(gate) * up, self.down_proj[...], sizes)
        out = out[jnp.argsort(order)].reshape(*experts.shape, D)
        return jnp.einsum("btkd,btk->btd", out, weights)


class Stacked(nnx.Module):
    """Layers created by `vmap`, their weights stacked, and run by a scan."""

    def __init__(self, *, dtype: Any, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return Layer(swiglu(dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)

        self.embed = nnx.Embed(V, D, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = create(rngs)
        self.norm = nnx.RMSNorm(D, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, lax_scan: bool) -> jax.Array:
        x = self.embed(tokens)
        if lax_scan:
            graph, state = nnx.split(self.layers)
            x, _ = jax.lax.scan(lambda x, one: (nnx.merge(graph, one)(x), None), x, state)
        else:
            x = nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )
        return self.embed.attend(self.norm(x))


def _stacked(dtype: Any, lax_scan: bool) -> Built:
    graph, state = nnx.split(Stacked(dtype=dtype, rngs=nnx.Rngs(0)))
    tokens = jnp.arange(T)[None]
    return Built(lambda state, tokens: nnx.merge(graph, state)(tokens, lax_scan), state, (tokens,))


def _lora(*, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """An adapter around each linear layer of the FFN, not yet merged into it."""
    mlp = swiglu(dtype=dtype, rngs=rngs)
    normal = nnx.initializers.normal(0.3)
    for name, (d_in, d_out) in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items():
        adapter = nnx.LoRA(
            d_in, 4, d_out, base_module=getattr(mlp, f"{name}_proj"), b_initializer=normal,
            dtype=dtype, param_dtype=dtype, rngs=rngs,
        )  # fmt: skip
        setattr(mlp, f"{name}_proj", adapter)
    return mlp


def _experts(**kw: Any) -> nnx.Module:
    return MoE(4, 2, **kw)


MODELS = [
    Model("NNX", "layers under nnx.scan", "forward", lambda dtype: _stacked(dtype, False), (
        ffn("feed_forward:state/layers/mlp", D, F, "silu", gated=True, repeats=3),
        head("state/embed/embedding/value", D, V),
    ), linears=4),
    Model("NNX", "layers under lax.scan", "forward", lambda dtype: _stacked(dtype, True), (
        ffn("feed_forward:state/layers/mlp", D, F, "silu", gated=True, repeats=3),
        head("state/embed/embedding/value", D, V),
    ), linears=4),
    # A sum of two products feeds the activation: no single weight stands for it.
    Model("NNX", "Qwen3 with LoRA", "forward", lambda dtype: qwen3(dtype, mlp=_lora), (HEAD,),
          linears=26),
    # Which rows of `ragged_dot` meet which expert is known at run time.
    Model("NNX", "Qwen3-MoE", "forward", lambda dtype: qwen3(dtype, mlp=_experts), (HEAD,),
          mapped=False, linears=10),
]  # fmt: skip
