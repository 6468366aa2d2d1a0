"""What heads and blocks of SmolLM2-135M read: the weights, and their inputs on text."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from examples.smollm2 import model, text, tokenizer, weights

_LENGTH, _BATCH = 256, 8


def head(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows f32[V, d], and what the head reads at Python's help topics, f32[tokens, d]."""
    params, config = weights.load()
    return np.asarray(params["embed"]), _read(params, config, tokens)


def block(layer: int, tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`gate`, `up` and `down`: f32[f, d], of a layer, and what it reads: f32[tokens, d]."""
    params, config = weights.load()
    layers = params["layers"]
    w = {name: layers[f"w_{name}"][layer] for name in ("gate", "up", "down")}
    # What the block reads is what the model up to here returns, without the block itself.
    short = {name: array[: layer + 1] for name, array in layers.items()}
    short["w_down"] = short["w_down"].at[layer].set(0.0)
    until = {**params, "layers": short, "final_norm": layers["ffn_norm"][layer]}
    config = model.Config(**(vars(config) | {"layers": layer + 1}))
    rows = {name: np.asarray(w[name].T if name != "down" else w[name]) for name in w}
    return rows, _read(until, config, tokens)


def _read(params: Any, config: model.Config, tokens: int) -> np.ndarray:
    # A last window that is not full counts too, so that any number of tokens can be asked for.
    count = -(-tokens // (_LENGTH * _BATCH)) * _LENGTH * _BATCH
    rows = text.windows(text.help_text(count, tokenizer.load()), _LENGTH)

    @jax.jit
    def read(params: Any, rows: Array) -> Array:
        cache = model.init_cache(config, len(rows), _LENGTH)
        return model._read(config, params, rows, cache, 0)[0]

    run = functools.partial(read, params)
    parts = [np.asarray(run(jnp.asarray(part))) for part in np.split(rows, len(rows) // _BATCH)]
    return np.concatenate(parts).reshape(-1, config.d_model)[:tokens]
