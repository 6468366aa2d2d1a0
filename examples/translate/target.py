"""The decoder's step and a call of it, as the command line wants them.

hire-rewrite inspect examples.translate.target:step
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from . import model, weights

SOURCE = 32  # tokens of the sentence


def step() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(decode_step, (params, token, state)) for one sentence, English to Portuguese."""
    params, config = weights.load()
    mask = jnp.ones((1, SOURCE), bool)
    encoded = jnp.zeros((1, SOURCE, config.d_model), jnp.float32)
    state = model.start(config, params, encoded, mask)
    decode_step = functools.partial(model.decode_step, config)
    return decode_step, (params, jnp.zeros(1, jnp.int32), state)
