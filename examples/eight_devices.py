"""A model that is sharded over eight devices, on one CPU: `python -m examples.eight_devices`.

Its FFN is divided by neurons and its head by tokens of the vocabulary, as on a machine with eight
accelerators. The weights are packed where they lie. Dense, the search for the best tokens has all
logits gathered; rewritten, `da_top_k` merges a few of each device.
"""

import os

os.environ["XLA_FLAGS"] = (  # before jax is imported
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.random import normal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from benchmarks.collectives import Collective, collectives

D, HIDDEN, VOCABULARY = 256, 1024, 32_768
BEST = 16


def decode_step(params: Any, token: Array) -> tuple[Array, Array]:
    """The BEST likeliest tokens after token: i32[batch], and their logits: [batch, BEST]."""
    x = params["embed"][token]
    x = x + (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]
    logits, tokens = lax.top_k(x @ params["head"], BEST)
    return tokens, logits


def sharded_params(mesh: Mesh) -> dict[str, Array]:
    """Random weights, each of them divided over the devices of a mesh, or on all of them."""
    layout = {
        "embed": ((VOCABULARY, D), P()),
        "gate": ((D, HIDDEN), P(None, "model")),
        "up": ((D, HIDDEN), P(None, "model")),
        "down": ((HIDDEN, D), P("model")),
        "head": ((D, VOCABULARY), P(None, "model")),
    }
    keys = jax.random.split(jax.random.key(0), len(layout))
    return {
        name: jax.device_put(normal(key, shape) / D**0.5, NamedSharding(mesh, spec))
        for key, (name, (shape, spec)) in zip(keys, layout.items(), strict=True)
    }


def main() -> dict[str, tuple[Array, list[Collective]]]:
    """The best tokens: i32[8, BEST] of both forms, and what goes between devices for them."""
    mesh = Mesh(jax.devices(), ("model",))
    params, token = sharded_params(mesh), jnp.arange(8)

    # `force`, for a model as small as this gains nothing.
    eight = hire.Linear(encoding=hire.Blocks(8), force=True)
    step = hire.transform(decode_step, hire.Head(k=64, force=True), eight)
    packed = step.pack(params, token)
    print(step.plan(packed, token))

    forms = {"dense": (decode_step, params), "rewritten": (step, packed)}
    results = {}
    for name, (function, weights) in forms.items():
        compiled = jax.jit(function).lower(weights, token).compile()
        tokens, _ = compiled(weights, token)
        sent = collectives(compiled.as_text() or "")
        print(f"\n{name}: {sum(one.bytes for one in sent):,} bytes between devices")
        for one in sent:
            print(f"  {one.kind:11}{one.bytes:10,}")
        results[name] = tokens, sent
    same = jnp.mean(results["dense"][0] == results["rewritten"][0])
    print(f"\n{same:.1%} of the best {BEST} tokens are the same, in the same order")
    return results


if __name__ == "__main__":
    main()
