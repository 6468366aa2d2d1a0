"""SmolLM2's decode step and a call of it, as the command line wants them.

hire-rewrite inspect examples.smollm2.target:step
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from . import model, weights

MAX_LEN = 512


def step() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(decode_step, (params, token, cache)) for one sequence."""
    params, config = weights.load()
    cache = model.init_cache(config, 1, MAX_LEN)
    decode_step = functools.partial(model.decode_step, config)
    return decode_step, (params, jnp.zeros(1, jnp.int32), cache)
