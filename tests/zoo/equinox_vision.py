"""Models of images and series built with Equinox."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from tests.zoo.equinox import batched
from tests.zoo.model import Expected, Model, ffn

D, F = 32, 128


class MixerBlock(eqx.Module):
    patch_mixer: eqx.nn.MLP
    hidden_mixer: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(self, patches: int, key: jax.Array):
        k1, k2 = jr.split(key)
        self.patch_mixer = eqx.nn.MLP(patches, patches, 64, depth=1, key=k1)
        self.hidden_mixer = eqx.nn.MLP(D, D, F, depth=1, key=k2)
        self.norm1 = eqx.nn.LayerNorm((D, patches))
        self.norm2 = eqx.nn.LayerNorm((patches, D))

    def __call__(self, y: jax.Array) -> jax.Array:
        y = y + jax.vmap(self.patch_mixer)(self.norm1(y))
        y = y.T
        y = y + jax.vmap(self.hidden_mixer)(self.norm2(y))
        return y.T


class Mixer(eqx.Module):
    """The mixer of images that Equinox's diffusion example trains."""

    conv_in: eqx.nn.Conv2d
    conv_out: eqx.nn.ConvTranspose2d
    blocks: list[MixerBlock]
    norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array):
        k1, k2, *keys = jr.split(key, 4)
        self.conv_in = eqx.nn.Conv2d(2, D, 2, stride=2, key=k1)
        self.conv_out = eqx.nn.ConvTranspose2d(D, 1, 2, stride=2, key=k2)
        self.blocks = [MixerBlock(16, one) for one in keys]
        self.norm = eqx.nn.LayerNorm((D, 16))

    def __call__(self, image: jax.Array) -> jax.Array:
        time = jnp.full_like(image[:1], 0.5)
        y = self.conv_in(jnp.concatenate([image, time]))
        hidden, height, width = y.shape
        y = y.reshape(hidden, height * width)
        for block in self.blocks:
            y = block(y)
        return self.conv_out(self.norm(y).reshape(hidden, height, width))


class RNN(eqx.Module):
    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        k1, k2 = jr.split(key)
        self.cell = eqx.nn.GRUCell(D, 64, key=k1)
        self.linear = eqx.nn.Linear(64, 1, key=k2)

    def __call__(self, x: jax.Array) -> jax.Array:
        start = jnp.zeros(64, x.dtype)
        last, _ = jax.lax.scan(lambda h, row: (self.cell(row, h), None), start, x)
        return jax.nn.sigmoid(self.linear(last))


def _cnn(key: jax.Array) -> eqx.nn.Sequential:
    k1, k2, k3 = jr.split(key, 3)
    return eqx.nn.Sequential([
        eqx.nn.Conv2d(1, 64, kernel_size=3, key=k1), eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(64, 128, kernel_size=1, key=k2), eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.AdaptiveAvgPool2d(1), eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(128, 10, key=k3),
    ])  # fmt: skip


def _mixers(name: str, d_model: int, width: int) -> tuple[Expected, ...]:
    scopes = "eqx.nn.MLP/eqx.nn.Linear"
    return tuple(
        ffn(f"{scopes}:params/blocks/{i}/{name}/layers/1/weight", d_model, width, "relu")
        for i in (0, 1)
    )


MODELS = [
    # Tokens and channels are mixed alike; the products of the former are FFNs over tokens.
    Model("Equinox", "MLP-Mixer", "forward", batched(Mixer, 1, 8, 8), (
        *_mixers("patch_mixer", 16, 64), *_mixers("hidden_mixer", D, F),
    )),
    Model("Equinox", "CNN", "forward", batched(_cnn, 1, 8, 8), linears=2),
    Model("Equinox", "GRU", "forward", batched(RNN, 5, D), linears=3),
]  # fmt: skip
