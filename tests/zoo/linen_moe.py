"""Mixtures of experts built with Flax Linen, and MaxText's fused gate."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from tests.zoo.linen import POSITIONS, TOKENS, D, G, V
from tests.zoo.linen_kit import Attention, RMSNorm, forward, scanned
from tests.zoo.linen_t5 import DenseGeneral
from tests.zoo.model import Model, ffn, head

EXPERTS, TOP, CAPACITY = 4, 2, 4


def routed(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The weights of the two best experts, one row of `EXPERTS` for each token and choice."""
    gate = nn.Dense(EXPERTS, use_bias=False, dtype=jnp.float32, name="gate")
    weights, chosen = jax.lax.top_k(gate(x.astype(jnp.float32)), TOP)
    weights = jax.nn.softmax(weights, axis=-1)
    return weights.astype(dtype), jax.nn.one_hot(chosen, EXPERTS, dtype=dtype)


def expert_weights(module: nn.Module, dtype: Any) -> tuple[jax.Array, ...]:
    """Gate, up and down projections of all experts, with the names that MaxText gives them."""
    init = nn.initializers.lecun_normal(batch_axis=0)
    shapes = {"wi_0": (EXPERTS, D, G), "wi_1": (EXPERTS, D, G), "wo": (EXPERTS, G, D)}
    return tuple(module.param(n, init, shape).astype(dtype) for n, shape in shapes.items())


class AllExperts(nn.Module):
    """Every expert for every token, weighted afterwards: MaxText's dense product."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weights, chosen = routed(x, self.dtype)
        wi_0, wi_1, wo = expert_weights(self, self.dtype)
        gate = jnp.einsum("BSM,EMH -> BSEH", x, wi_0)
        hidden = nn.silu(gate) * jnp.einsum("BSM,EMH -> BSEH", x, wi_1)
        y = jnp.einsum("BSEH,EHM -> BSEM", hidden, wo)
        combined = jnp.einsum("BSK,BSKE -> BSE", weights, chosen)
        return jnp.einsum("BSEM,BSE -> BSM", y, combined)


class Dispatched(nn.Module):
    """A buffer of tokens for each expert, filled and emptied by einsums with masks."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weights, chosen = routed(x, self.dtype)
        place = jnp.cumsum(chosen.reshape(x.shape[0], -1, EXPERTS), axis=1).reshape(chosen.shape)
        slot = jax.nn.one_hot((place * chosen).astype(jnp.int32), CAPACITY + 1, dtype=self.dtype)
        mask = slot[..., 1:]
        combine = jnp.einsum("BSK,BSKEC -> BSEC", weights, mask)
        dispatch = (combine > 0).astype(self.dtype)
        wi_0, wi_1, wo = expert_weights(self, self.dtype)
        x = jnp.einsum("BSM,BSEC -> EBCM", x, dispatch)
        hidden = nn.silu(jnp.einsum("EBCM,EMH -> EBCH", x, wi_0))
        hidden = hidden * jnp.einsum("EBCM,EMH -> EBCH", x, wi_1)
        y = jnp.einsum("EBCH,EHM -> EBCM", hidden, wo)
        return jnp.einsum("EBCM,BSEC -> BSM", y, combine)


class Expert(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        return dense(D, name="wo")(nn.relu(dense(G, name="wi")(x)))


class Switch(nn.Module):
    """One expert for each token; the experts are one module under `nn.vmap`, as in Flaxformer."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weights, chosen = routed(x, self.dtype)
        combine = chosen[:, :, 0] * weights[:, :, :1]
        inputs = jnp.einsum("gtm,gte->egtm", x, (combine > 0).astype(self.dtype))
        experts = nn.vmap(
            Expert, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
        )
        outputs = experts(self.dtype, name="expert")(inputs)
        return jnp.einsum("egtm,gte->gtm", outputs, combine)


class FusedMlp(nn.Module):
    """Both halves of the gate from one weight with two output axes."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = DenseGeneral((2, G), self.dtype, name="wi")(x)
        y = checkpoint_name(y, "mlpwi")
        y = (nn.silu(y[:, :, 0, ...]) * y[:, :, 1, ...]).astype(self.dtype)
        return DenseGeneral((D,), self.dtype, name="wo")(y)


class Layer(nn.Module):
    dtype: Any
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, None]:
        attention = Attention(dtype=self.dtype, kv_heads=2, rope=True, name="self_attention")
        x = x + attention(RMSNorm(name="pre_norm")(x), positions)
        return x + self.block(self.dtype, name="mlp")(RMSNorm(name="post_norm")(x)), None


class Decoder(nn.Module):
    """Two layers, or a scan over three; the logits are in float32."""

    dtype: Any
    block: type[nn.Module]
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = nn.Embed(V, D, dtype=self.dtype, name="token_embedder")(tokens)
        if self.scanned:
            x, _ = scanned(Layer)(self.dtype, self.block, name="layers")(x, positions)
        else:
            for i in range(2):
                x, _ = Layer(self.dtype, self.block, name=f"layers_{i}")(x, positions)
        x = RMSNorm(name="decoder_norm")(x)
        logits = DenseGeneral((V,), self.dtype, name="logits_dense")(x)
        return logits.astype(jnp.float32)


def _moe(name: str, block: type[nn.Module], weights: str, *fields: Any, **more: Any) -> Model:
    make = functools.partial(Decoder, block=block)
    build = forward(make, TOKENS, POSITIONS)
    stack = "Decoder/layers_{}/mlp" + ("/expert" if "expert" in weights else "")
    return Model("Linen", name, "forward", build, (
        *(ffn(f"{stack}:params/layers_{{}}/mlp{weights}".format(i, i), D, G, *fields,
              experts=EXPERTS, **more) for i in range(2)),
        head("Decoder/logits_dense:params/logits_dense/kernel", D, V),
    ), linears=10)  # fmt: skip


MODELS = [
    _moe("Mixtral (all experts)", AllExperts, "/wo", "silu", gated=True),
    _moe("Mixtral (dispatched)", Dispatched, "/wo", "silu", gated=True),
    _moe("Switch (vmapped experts)", Switch, "/expert", "relu"),
    Model("Linen", "MaxText (fused gate, scanned axis 1)", "forward",
          forward(functools.partial(Decoder, block=FusedMlp, scanned=True), TOKENS, POSITIONS), (
        ffn("Decoder/layers/mlp:params/layers/mlp", D, G, "silu", gated=True, repeats=3),
        head("Decoder/logits_dense:params/logits_dense/kernel", D, V),
    ), linears=4),
]  # fmt: skip
