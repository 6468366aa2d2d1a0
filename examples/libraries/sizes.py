"""What the three models share: their sizes, and how their weights are published."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

import hire_rewrite as hire

Weights = TypeVar("Weights")
ROPE_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    vocabulary: int = 16_384
    d: int = 512
    hidden: int = 1536
    layers: int = 4
    heads: int = 8
    max_len: int = 64

    @property
    def head_dim(self) -> int:
        return self.d // self.heads


SIZES = Sizes()


def published(weights: Weights) -> Weights:
    """Random weights as checkpoints hold them, in bfloat16, and widened to float32 for a CPU.

    `pack` finds that they fit bfloat16 and stores them so again: nothing is rounded twice.
    """
    return jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(jnp.float32), weights)


def report(plan: hire.Plan, dense: jax.Array, rewritten: jax.Array) -> None:
    """Print the plan, the tokens of both, i32[..., n], of one sequence, and how many are equal."""
    print(plan)
    for name, tokens in {"dense:": dense, "rewritten:": rewritten}.items():
        print(f"{name:10}", *tokens.reshape(-1, tokens.shape[-1])[0].tolist())
    print(f"the same: {int(jnp.sum(dense == rewritten))} of {dense.size} tokens")
