"""`demo`: a small model, its plan, its diff and its times; also a TARGET to try the others on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

LAYERS, D, HIDDEN, VOCABULARY = 4, 256, 1024, 16_384


def model() -> tuple[Callable[..., Array], tuple[Any, Array]]:
    """A stack of gated blocks and a tied head with random weights, and a call for one token."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D)}
    layers = {
        name: jax.random.normal(key, (LAYERS, *shape)) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    embed = jax.random.normal(keys[3], (VOCABULARY, D)) / D**0.5

    def step(params: Any, token: Array) -> Array:
        def block(x: Array, w: Any) -> tuple[Array, None]:
            return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

        x, _ = lax.scan(block, params["embed"][token], params["layers"])
        return x @ params["embed"].T

    return step, ({"layers": layers, "embed": embed}, jnp.zeros(1, jnp.int32))


def batches() -> list[tuple[Array]]:
    """Random tokens for `model`."""
    rng = np.random.default_rng(0)
    return [(jnp.asarray(rng.integers(0, VOCABULARY, 32), jnp.int32),) for _ in range(4)]


@click.command()
@click.pass_context
def demo(context: click.Context) -> None:
    """A small model with random weights: its plan, its diff and its times.

    \b
    Examples:
      hire-rewrite demo
    """
    from hire_rewrite.command.bench import bench
    from hire_rewrite.command.see import diff, inspect

    target = f"{__name__}:model"
    rules = ["--rule", "Head(k=64, predictor=Quantized(4), force=True)"]
    rules += ["--rule", "Linear(encoding=Blocks(8), force=True)"]
    for each in (inspect, diff, bench):
        click.echo(f"\n$ hire-rewrite {each.name} {target} " + " ".join(f"'{r}'" for r in rules))
        each.main([target, *rules], standalone_mode=False, parent=context)
