"""Models of images built with Flax Linen: ten classes are no vocabulary, a convolution no FFN.

A representation layer and the classes behind it do not return to their input's size: no FFN.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.zoo.linen import D, F
from tests.zoo.linen_kit import forward
from tests.zoo.model import Model, ffn

CLASSES, PATCHES = 10, 16
IMAGE = jnp.sin(jnp.arange(16 * 16 * 3, dtype=jnp.float32) ** 1.5).reshape(1, 16, 16, 3)


class MlpBlock(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class Encoder1DBlock(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, dtype=self.dtype)(y, y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + MlpBlock(F, self.dtype)(y), None


class ViT(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = nn.Conv(D, (4, 4), (4, 4), "VALID", dtype=self.dtype, name="embedding")(image)
        x = x.reshape(x.shape[0], PATCHES, D)
        x += self.param("pos_embedding", nn.initializers.normal(0.2), (1, PATCHES, D), self.dtype)
        cls = self.param("cls", nn.initializers.normal(0.2), (1, 1, D), self.dtype)
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        for i in range(2):
            x, _ = Encoder1DBlock(self.dtype, name=f"encoderblock_{i}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)[:, 0]
        x = nn.tanh(nn.Dense(D, dtype=self.dtype, name="pre_logits")(x))
        return nn.Dense(CLASSES, dtype=self.dtype, name="head")(x)


class MixerBlock(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.swapaxes(nn.LayerNorm(dtype=self.dtype)(x), 1, 2)
        x = x + jnp.swapaxes(MlpBlock(64, self.dtype, name="token_mixing")(y), 1, 2)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + MlpBlock(F, self.dtype, name="channel_mixing")(y)


class MlpMixer(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = nn.Conv(D, (4, 4), (4, 4), dtype=self.dtype, name="stem")(image)
        x = x.reshape(x.shape[0], PATCHES, D)
        for _ in range(2):
            x = MixerBlock(self.dtype)(x)
        x = jnp.mean(nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x), axis=1)
        return nn.Dense(CLASSES, dtype=self.dtype, name="head")(x)


class ResNetBlock(nn.Module):
    filters: int
    strides: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, num_groups=4, dtype=self.dtype)
        y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.filters, (3, 3), self.strides)(y)))
        y = norm()(conv(self.filters * 4, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(
                conv(self.filters * 4, (1, 1), self.strides, name="conv_proj")(x)
            )
        return nn.relu(x + y)


class ResNet(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = nn.Conv(16, (7, 7), (2, 2), use_bias=False, dtype=self.dtype, name="conv_init")(image)
        x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
        for i in range(2):
            x = ResNetBlock(16 * 2**i, (1 + i, 1 + i), self.dtype)(x)
        return nn.Dense(CLASSES, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))


class VAE(nn.Module):
    """Two layers in a row on each side of the code, and pixels, which are no vocabulary."""

    dtype: Any

    @nn.compact
    def __call__(self, image: jax.Array, noise: jax.Array) -> tuple[jax.Array, ...]:
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        x = image.reshape(image.shape[0], -1)
        x = nn.relu(dense(128, name="encoder_fc1")(x))
        mean, variance = dense(8, name="fc2_mean")(x), dense(8, name="fc2_logvar")(x)
        z = mean + noise * jnp.exp(0.5 * variance)
        z = nn.relu(dense(128, name="decoder_fc1")(z))
        return dense(768, name="decoder_fc2")(z).reshape(-1, 24, 32), mean, variance


MODELS = [
    Model("Linen", "ViT", "forward", forward(ViT, IMAGE), (
        *(ffn(f"ViT/encoderblock_{i}/MlpBlock_0:params/encoderblock_{i}/MlpBlock_0/Dense_1/kernel",
              D, F, "gelu_tanh") for i in range(2)),
    ), linears=10),
    Model("Linen", "MLP-Mixer", "forward", forward(MlpMixer, IMAGE), tuple(
        ffn(f"MlpMixer/MixerBlock_{i}/{name}:params/MixerBlock_{i}/{name}/Dense_1/kernel",
            d, width, "gelu_tanh")
        for i in range(2)
        for name, d, width in (("token_mixing", PATCHES, 64), ("channel_mixing", D, F))
    ), linears=1),
    Model("Linen", "ResNet", "forward", forward(ResNet, IMAGE), linears=6),
    Model("Linen", "VAE", "forward", forward(VAE, IMAGE, jnp.ones((1, 8))), linears=5),
]  # fmt: skip
